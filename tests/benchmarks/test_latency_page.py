"""What a page says of latency over arithmetic follows from the rows."""

import json
import xml.etree.ElementTree as ElementTree

from benchmarks import latency_page as pages
from benchmarks import readme, record

SPACE = "{http://www.w3.org/2000/svg}"


def row(share, ratio, runtime="eager", mode="end_to_end", base="r101", **more):
    """As `benchmarks.latency` prints it; a whole base has 200 GMACs and takes 400 ms."""
    model = base if share == 1 else f"{base} cut to {share:g}"
    made = {"case": "latency", "model": model, "base": base, "mode": mode, "runtime": runtime, "dtype": "float32"}
    made |= {"batch_size": 1, "weights": "random", "images": "noise", "size": [800, 1333], "device": "Some CPU"}
    made |= {"params": int(6e7 * share), "gmacs": 200 * share, "macs_of_base": share, "p50": 400 * ratio}
    made |= {"ratio": ratio, "ratio_interval": [ratio - 0.01, ratio + 0.01], "control": {"holds": True}}
    made |= {"facts": {"detections_per_image": 3.5}, "environment": {"runtime_version": "2.11"}, "commit": "abc"}
    return made | ({} if share == 1 else {"verdict": "faster"}) | more


EAGER = [row(1, 1.0), row(0.7, 0.73), row(0.5, 0.57), row(0.4, 0.49), row(0.3, 0.4)]
RUNTIME = [row(share, ratio, "onnxruntime") for share, ratio in ((1, 1.0), (0.5, 0.6), (0.3, 0.55))]
ROWS = [*EAGER, *RUNTIME, row(1, 1.0, mode="model_only"), row(0.3, 0.38, mode="model_only")]


def test_what_the_published_latency_takes_is_interpolated_in_each_runtime():
    said = pages.verdict(ROWS)
    assert said == (
        "eager, end to end: **−47 % of the latency at −55 % of the multiply-accumulates** (interpolated between 0.50 "
        "and 0.40 of them). onnxruntime, end to end: −47 % of the latency is not reached; 0.30 of the "
        "multiply-accumulates take 0.550 (0.540–0.560)."
    )
    assert pages.verdict([row(1, 1.0, mode="model_only"), row(0.5, 0.53, mode="model_only")]) == (
        "eager, model only: **−47 % of the latency at −50 % of the multiply-accumulates** (interpolated between 1.00 "
        "and 0.50 of them)."
    )
    assert pages.verdict([row(1, 1.0)]) == ""


def test_a_table_has_a_line_a_detector_and_runtime_and_columns_for_each_mode():
    lines = pages.table(ROWS).splitlines()
    assert lines[0].startswith("| runtime | GMACs | of the base's | parameters | end to end, p50 | over the base")
    assert lines[2] == "| eager | 200 | 1.000 | 60.0 M | 400 ms | 1 | 400 ms | 1 | 3.5 |"
    assert lines[3] == "| eager | 140 | 0.700 | 42.0 M | 292 ms | 0.730 (0.720–0.740) | – | – | 3.5 |"
    assert lines[6].endswith("| 160 ms | 0.400 (0.390–0.410) | 152 ms | 0.380 (0.370–0.390) | 3.5 |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| eager"] * 5 + ["| onnxruntime"] * 3


def test_map_stands_beside_the_latency_of_what_was_scored():
    facts = {"detections_per_image": 2, "map": 0.3125}
    lines = pages.table([row(1, 1.0, facts=facts), row(0.5, 0.6)]).splitlines()
    assert lines[0].endswith("| detections | mAP |") and lines[1].count("---:") == lines[0].count("|") - 2
    assert lines[2].endswith("| 2 | 0.312 |") and lines[3].endswith("| 3.5 | – |")


def test_what_cannot_be_believed_is_marked():
    wrong = {"control": {"holds": False}}
    rows = [row(1, 1.0, **wrong), row(0.9, 0.97, verdict="not resolved", **wrong)]
    assert pages.verdict(rows).endswith("take 0.970 (0.960–0.980) not resolved; A/A fails, so none of it is resolved.")
    lines = pages.table(rows).splitlines()
    assert "| 1, A/A fails |" in lines[2] and "| 0.970 (0.960–0.980) not resolved |" in lines[3]


def test_the_last_row_of_a_detector_counts_and_bases_have_parts_of_their_own():
    other = [row(1, 1.0, base="fcos", size=[400, 667]), row(0.5, 0.7, base="fcos", size=[400, 667])]
    said = pages.page([row(0.5, 0.9), *ROWS, *other])
    assert "0.900" not in said and said.startswith("![latency over multiply-accumulates, both over the base's](latency")
    assert said.index("### r101, 800x1333") < said.index("### fcos, 400x667")
    assert "Some CPU; float32, batch 1; random weights, noise; eager 2.11, onnxruntime 2.11; commit abc." in said
    assert pages.page([]) == "Not measured."
    assert "![" not in pages.page([row(1, 1.0)]) and not pages.charts([row(1, 1.0)])


def test_a_drawing_has_a_panel_a_base_a_curve_a_runtime_and_mode_and_the_published_line():
    (drawn,) = pages.charts([*ROWS, row(1, 1.0, base="fcos"), row(0.5, 0.7, base="fcos")]).values()
    first, second = ElementTree.fromstring(drawn).findall(f"{SPACE}g")
    curves = [path for path in first.findall(f"{SPACE}path") if path.get("stroke") != pages.GREY]
    assert [(path.get("stroke"), path.get("stroke-dasharray")) for path in curves] == [
        ("#0072B2", None), ("#0072B2", "6 4"), ("#D55E00", None)
    ]  # fmt: skip
    assert [path.get("d").count("L") for path in curves] == [4, 1, 2]
    assert len(first.findall(f"{SPACE}circle")) == len(ROWS) and len(second.findall(f"{SPACE}circle")) == 2
    (line,) = first.findall(f"{SPACE}line[@class='published']")
    heights = [float(point.get("cy")) for point in first.findall(f"{SPACE}circle")][:5]
    assert heights[2] < float(line.get("y1")) < heights[3], "between 0.57 and 0.49 of the latency"
    assert first.find(f"{SPACE}text[@y='10']").text == "r101, 800x1333"


def test_several_devices_are_told_apart():
    (drawn,) = pages.charts([*EAGER, *(each | {"device": "Some GPU"} for each in EAGER)]).values()
    assert ">r101, 800x1333, Some CPU<" in drawn and ">r101, 800x1333, Some GPU<" in drawn


def test_the_page_and_the_drawing_are_written_from_committed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = "Before.\n<!-- results of latency -->\nold\n<!-- end of results -->\nAfter."
    assert readme.rendered(text) == text.replace("old", "Not measured.") and not readme.drawings()
    kept = tmp_path / "some-cpu" / "latency.jsonl"
    kept.parent.mkdir()
    kept.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    assert "−47 % of the latency at −55 %" in readme.rendered(text)
    assert [file.name for file in readme.drawings()] == ["latency.svg"]
