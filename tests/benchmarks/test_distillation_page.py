"""What a page says of the worth of teachers follows from the rows, and from nothing else."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import distillation_page as pages
from benchmarks import readme, record

BY_QUARTER = (0.25, 0.5, 0.75, 1.0)


def row(teacher, student, loss, maps, gain=None, weight="auto", data="digit_scenes", **more):
    """As `benchmarks.distillation` prints it; mAP grows evenly."""
    made = {"op": "distillation", "data": data, "teacher": teacher, "student": student, "loss": loss, "weight": weight}
    made |= {"seeds": [0, 1], "steps": 800, "maps": maps, "curves": [[share * m for share in BY_QUARTER] for m in maps]}
    made |= {"device": "Some CPU, 1 threads", "commit": "abc"} | more
    if gain is not None:
        low, mean, high = gain
        made |= {"gain": mean, "gain_interval": [low, high], "teacher_map": 0.6}
    return made


ALONE = row("nobody", "fcos", "none", [0.2, 0.3])
WON = row("fasterrcnn", "fcos", "pkd", [0.4, 0.5], (0.1, 0.2, 0.3))
BEHIND = row("fasterrcnn", "fcos", "mse", [0.1, 0.2], (-0.2, -0.1, -0.05))
SPREAD = row("fcos", "fcos", "pkd", [0.25, 0.26], (-0.05, 0.005, 0.06))
BETTER = row("fcos", "fcos", "cwd", [0.3, 0.3], (0.01, 0.05, 0.09))
ROWS = [ALONE, WON, BEHIND, SPREAD, BETTER]


def test_pkd_wins_where_its_whole_interval_lies_above_0():
    said = pages.verdict(ROWS)
    assert said.startswith(
        "**In 800 steps PKD beats training without a teacher by more than the spread on 1 of 2 pairs (fasterrcnn → "
        "fcos); at least 2 were asked for, which is not met.** It does not on fcos → fcos: +0.005 (-0.050 to +0.060) "
        "(the teacher scores 0.600, the student alone 0.250). Its gain is the largest of pkd, cwd, mse on 1 of 2 pairs "
        "(fasterrcnn → fcos)."
    )
    other = row("retinanet", "fcos", "pkd", [0.4, 0.4], (0.01, 0.15, 0.2))
    assert "on 2 of 3 pairs (fasterrcnn → fcos, retinanet → fcos); at least 2 were asked for, which is met.**" in (
        pages.verdict([*ROWS, other])
    )
    assert "mse on 1 of 2 pairs (fasterrcnn → fcos)." in pages.verdict([*ROWS, other]), "none was run beside the other"
    lost = row("fcos", "fcos", "pkd", [0.1, 0.1], (-0.2, -0.1, -0.01))
    assert "-0.100 (-0.200 to -0.010), which is behind (the teacher" in pages.verdict([ALONE, lost])


def test_convergence_is_when_the_mean_curve_has_what_training_alone_ends_with():
    assert "fasterrcnn → fcos after 600 of 800; fcos → fcos after 800 of 800." in pages.verdict(ROWS)
    never = row("fcos", "fcos", "pkd", [0.1, 0.1], (-0.2, -0.1, -0.01))
    assert pages.verdict([ALONE, never]).endswith("ends with: fcos → fcos never.")


def test_other_lengths_and_inheriting_have_tables_of_their_own_and_count_for_no_verdict():
    assert not pages.lengths(ROWS) and not pages.inherited(ROWS)
    short = [ALONE | {"steps": 200, "maps": [0.1, 0.1]}, WON | {"steps": 200}]
    more = [row("fasterrcnn", "fcos", loss, [0.4, 0.4], (0.01, 0.1, 0.2)) for loss in pages.INHERITED]
    rows = [*ROWS, *short, *more]
    first, second, third = pages.lengths(rows).splitlines()[-3:]
    assert first == "| fasterrcnn → fcos | 200 | 0.100 | pkd | 0.400 0.500 | 0.450 | +0.200 (+0.100 to +0.300) |"
    assert second.startswith("| fasterrcnn → fcos | 800 | 0.250 | pkd |") and "| 800 | 0.250 | mse |" in third
    assert "on this many pairs: 1 of 1 in 200 steps, 1 of 1 in 800 steps.**" in pages.lengths(rows)
    last = pages.inherited(rows).splitlines()[-1]
    assert last.count("| 0.400 0.400 | 0.400 | +0.100 (+0.010 to +0.200) |") == 1 and last.count("+0.100") == 2
    said = pages.page(rows)
    assert pages.verdict(ROWS) in said and pages.lengths(rows) in said and pages.inherited(rows) in said
    assert pages.charts(rows) == pages.charts(ROWS)


def test_teaching_for_half_of_the_steps_has_a_sentence_of_its_own():
    assert "first half" not in pages.verdict(ROWS)
    half = row("fcos", "fcos", pages.HALF, [0.3, 0.3], (0.01, 0.05, 0.09))
    said = pages.verdict([*ROWS, half])
    assert said.endswith("by more than the spread on 1 of 1 pairs**: fcos → fcos +0.050 (+0.010 to +0.090).")
    assert "spread on 1 of 2 pairs (fasterrcnn → fcos); at least 2" in said, "it does not count for PKD throughout"
    assert "largest of pkd, cwd, mse on 1 of 2 pairs" in said, "nor is it one of its rivals"


def test_what_alignment_is_worth_stands_beside_what_there_is_without_it():
    assert "--align" not in pages.verdict(ROWS)
    aligned = [row(who, "fcos", "pkd_permute", [0.3, 0.3], (0.01, 0.05, 0.09)) for who in ("fasterrcnn", "gfl")]
    said = pages.verdict([*ROWS, *aligned])
    assert said.endswith(
        "What PKD gains with --align permute: fasterrcnn → fcos +0.050 (+0.010 to +0.090), without +0.200 (+0.100 to "
        "+0.300); gfl → fcos +0.050 (+0.010 to +0.090)."
    )
    assert "largest of pkd, cwd, mse on 1 of 2 pairs" in said, "it is no rival"
    assert pages.ALIGNED.keys() <= pages.COLOURS.keys() and len({*pages.COLOURS.values()}) == len(pages.COLOURS)


def test_a_table_has_the_latest_row_of_each_way_pair_by_pair():
    old = row("fasterrcnn", "fcos", "pkd", [0.9, 0.9], (0.4, 0.6, 0.7))
    lines = pages.table(pages.latest([old, BEHIND, SPREAD, ALONE, WON])).splitlines()
    assert lines[2] == "| – | fcos | none | 0.200 0.300 | 0.250 | – | 0.062 0.125 0.188 0.250 |"
    assert lines[3].startswith("| fasterrcnn (0.600) | fcos | pkd | 0.400 0.500 | 0.450 | +0.200 (+0.100 to +0.300) |")
    assert lines[3].endswith("| 0.113 0.225 0.338 0.450 |")
    assert [line.split(" | ")[2] for line in lines[3:]] == ["pkd", "mse", "pkd"] and "0.900" not in "".join(lines)


def test_the_sweep_names_the_best_weight_and_the_published_one():
    weights = [(1.0, -0.01), (6.0, 0.02), (20.0, 0.01)]
    swept = [
        row("fasterrcnn", "fcos", "pkd", [0.4, 0.5], (low, low + 0.1, low + 0.2), weight=weight)
        for weight, low in weights
    ]
    short = row("fasterrcnn", "fcos", "pkd", [0.1, 0.2], (-0.2, -0.1, 0), weight=2.0, steps=200)
    said = pages.page([*ROWS, short, *reversed(swept)])
    assert "fasterrcnn → fcos, 800 steps: the best of 3 is 6 (the published one is 6); the whole interval" in said
    assert "fasterrcnn → fcos, 200 steps: the best of 1 is 2 " in said, "another length is another table"
    assert "lies above 0 at 6, 20." in said and "| 1 | 0.400 0.500 | +0.090 (-0.010 to +0.190) |\n| 6 |" in said
    assert said.count("| fasterrcnn (0.600) | fcos | pkd |") == 1, "and is not in the table of the pairs"
    alone = pages.page([row("fcos", "retinanet", "pkd", [0.4], (-0.1, 0, 0.1), weight=2.0)])
    assert "the best of 1 is 2 (the published one is 10); the whole interval lies above 0 at none of them." in alone


def test_each_data_set_has_a_part_of_its_own_and_a_drawing():
    cells = [dict(each, data="blood_cells") for each in ROWS]
    said = pages.page([*ROWS, *cells])
    assert said.index("### Digit scenes") < said.index("### Photographs of blood cells")
    assert said.count("on 1 of 2 pairs") == 4 and "800 steps of every student, 2 seeds; on Some CPU, 1 threads." in said
    drawn = pages.charts([*ROWS, *cells])
    assert [*drawn] == ["distillation-digit_scenes.svg", "distillation-blood_cells.svg"]
    assert all(f"]({name})" in said for name in drawn)
    assert pages.page([]) == "Not measured."


def test_a_drawing_has_a_panel_a_pair_and_a_line_a_seed():
    (drawn,) = pages.charts(ROWS).values()
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(drawn)
    panels = root.findall(f"{space}g")
    assert [panel.find(f"{space}text[@y='10']").text for panel in panels] == ["fasterrcnn → fcos", "fcos → fcos"]
    assert [len(panel.findall(f"{space}path")) for panel in panels] == [9, 9], "three losses of two seeds and a mean"
    ends = [path.get("d") for path in panels[0].findall(f"{space}path") if path.get("stroke-width") == "2.2"]
    heights = [float(end.split(" ")[-1]) for end in ends]
    assert len({end.count("L") for end in ends}) == 1 and heights[1] < heights[0] < heights[2], "PKD ends the highest"


def test_a_swap_says_what_features_are_worth_under_another_head():
    swap = {"head": "retinanet", "op": "distillation_swap"}
    rows = [ALONE | swap, WON | swap, row("nobody", "retinanet", "none", [0.1, 0.1], head="fcos")]
    said = pages.swaps(rows)
    assert "800 steps of every head, 2 seeds; on Some CPU, 1 threads." in said
    assert "beat those of an untaught one by more than the spread on 1 of 1 pairs.**" in said
    assert "| fcos | fasterrcnn, pkd | retinanet | 0.400 0.500 | +0.200 (+0.100 to +0.300) |" in said
    assert "| retinanet | nobody | fcos | 0.100 0.100 | – |" in said
    assert pages.swaps([]) == "Not measured."


@pytest.mark.parametrize("op", ["distillation", "distillation_swap"])
def test_pages_are_written_from_committed_rows(op, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = f"Before.\n<!-- results of {op} -->\nold\n<!-- end of results -->\nAfter."
    assert readme.rendered(text) == text.replace("old", "Not measured.") and not readme.drawings()
    kept = tmp_path / "some-cpu" / f"{op}.jsonl"
    kept.parent.mkdir()
    kept.write_text("".join(json.dumps(each | {"head": "fcos"}) + "\n" for each in ROWS[:2] + ROWS[3:4]))
    written = readme.rendered(text)
    assert written.startswith("Before.") and "\nold" not in written and "by more than the spread on 1 of" in written
    assert [file.name for file in readme.drawings()] == ["distillation-digit_scenes.svg"] * (op == "distillation")
