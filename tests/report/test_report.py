import json
import os
import re
import shutil
from contextlib import closing

import pytest
from rich.console import Console

from jdkd.errors import InputError
from jdkd.report import read_outcome, result_table, summary, verdict, write_report
from jdkd.report.search_page import page
from jdkd.search.archive import Archive
from tests.report.made_up import entry, make_search, result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a finished search that nobody changes."""
    return make_search(tmp_path_factory.mktemp("made") / "search")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "search")


@pytest.fixture(scope="module")
def text(made):
    """The page of a finished search."""
    return page(read_outcome(made))


@pytest.fixture
def single():
    """A result for one target, which was missed."""
    about = {"target": 0.53, "target_met": False, "id": "007", "folder": "student"}
    return {
        "base": entry(0.36, 20.0, 1.0, 0),
        "control": entry(0.44, 20.0, 1.0, 700),
        "students": [entry(0.49, 12.0, 0.6, 700, **about)],
        "report": {"images": 51},
        "selection": {"images": 50},
        "target_map": None,
        "target_met": False,
    }


def _rewritten(folder, **changes):
    """The text of the page after the result was changed; None takes a part out."""
    found = json.loads((folder / "result.json").read_text()) | changes
    (folder / "result.json").write_text(json.dumps({name: part for name, part in found.items() if part is not None}))
    return page(read_outcome(folder))


def _sections(text):
    return re.findall(r'<section id="([\w-]+)">', text)


def test_page_stands_alone(folder):
    plot, html = write_report(folder)
    text = html.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    for forbidden in ("http", "<link", "@import", "url(", "src=", "$"):
        assert forbidden not in text
    assert 'name="viewport"' in text and text.count("<script>") == 1


def test_page_has_a_section_for_everything_that_a_search_wrote(text):
    assert _sections(text) == [
        *("result", "over-time", "architecture", "lineage", "teachers", "latency", "cost", "candidates", "made")
    ]
    for name in _sections(text):
        assert f'<a href="#{name}">' in text
    assert "Kendall&#x27;s tau) is 0.91, the mean absolute error 3.2 %" in text
    assert '<p id="fixed">By the table of its parts, 0.20 of the base&#x27;s latency is none that a cut saves; ' in text
    assert (
        "training 15.0 min (72.6 %)" in text and "pool 3.3 min (13.6 %)" in text and "teacher pool 300 (9.1 %)" in text
    )
    assert "jdkd search --base &#x27;a folder&#x27;" in text
    where = "of data/instances_val2017.json in data/val2017"
    assert f"chose on 50 images with 120 boxes {where} (half, the lower SHA-256 of image files)" in text


def test_parts_that_a_result_lacks_are_left_out_with_their_headings(folder):
    (folder / "teachers.json").unlink()
    lacks = ("predictor", "cost", "aa", "fixed_share", "control", "report", "selection")
    text = _rewritten(folder, **dict.fromkeys(lacks))
    assert not {"cost", "predictions"} & set(_sections(text))
    assert "Kendall" not in text and 'id="aa"' not in text and 'id="fixed"' not in text and "(the control)" not in text


def test_a_clock_that_cannot_be_trusted_is_said_on_top(folder, text):
    assert 'class="alarm"' not in text
    text = _rewritten(folder, aa={"ratio": 1.03, "interval": [1.01, 1.05]})
    alarm = text.index('<p class="alarm">The clock of this search cannot be trusted')
    assert alarm < text.index("<section") and "takes 1.030 of its own time (95 %: 1.010–1.050)" in text[alarm:]


def test_every_student_has_its_sentence_beside_base_and_control(folder, text):
    found = json.loads((folder / "result.json").read_text())
    for student in found["students"]:
        assert f"{student['target']} was asked for" in text or f"misses the {student['target']} that was" in text
        over = f"{student['map'] - 0.36:+.3f} against the base".replace("-", "−")
        assert f"Its mAP is {student['map']:.3f}, {over}" in text
    assert len({student["target_met"] for student in found["students"]}) == 2  # one is met and one is missed


def test_the_scores_of_a_running_search_are_told_without_a_result(tmp_path):
    folder = make_search(tmp_path / "search", finished=False)
    text = write_report(folder)[1].read_text()
    assert "This search is not finished: 23 candidates" in text and "3 of them failed" in text
    best = max(one.map for one in read_outcome(folder).scored if one.latency_ratio <= 0.75)
    assert f"{best:.3f} at most within 0.75 of the base" in text
    assert "result" not in _sections(text) and {"over-time", "architecture", "lineage"} <= set(_sections(text))


def test_the_slider_knows_every_generation(folder, text):
    told = json.loads(re.search(r'data-told="([^"]*)"', text).group(1).replace("&quot;", '"'))
    outcome = read_outcome(str(folder))
    assert told[0] == [0, f"generation 0 of {told[-1][0]}, 0 candidates"]
    assert f"{len(outcome.scored) - 1} candidates" in told[-1][1]
    assert len(re.findall(r"data-at=", text)) == len(told)
    assert len(re.findall(r'data-at="\d+" hidden', text)) == len(told) - 1
    assert len(re.findall(r"data-g=", text)) == len(outcome.scored)


def test_failed_candidates_are_in_the_tree_with_their_reason_and_in_no_plot(text):
    tree = text[text.index('id="lineage"') : text.index('id="teachers"')]
    assert tree.count('class="cross"') == 3 and tree.count("failed: the losses of step 31 are not finite") == 6
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text)


def test_a_report_that_two_processes_write_at_once_is_whole(folder, monkeypatch):
    replace = os.replace

    def meanwhile(partial, file):
        with monkeypatch.context() as other:
            other.setattr(os, "replace", replace)
            other.setattr(os, "getpid", lambda: 1)
            write_report(folder)
        replace(partial, file)

    monkeypatch.setattr(os, "replace", meanwhile)
    plot, text = write_report(folder)
    assert plot.read_bytes()[:4] == b"\x89PNG" and text.read_text().rstrip().endswith("</html>")
    assert not [file for file in folder.iterdir() if "partial" in file.name]


def test_teachers_that_are_none_are_named(folder):
    for content in ("[1]", "[{}]", '{"a": 1}'):
        (folder / "teachers.json").write_text(content)
        with pytest.raises(InputError, match=r"teachers\.json holds something else than it should"):
            write_report(folder)


def test_outcome_has_the_lineages_from_the_base_to_the_students(folder):
    outcome = read_outcome(folder)
    assert len(outcome.candidates) == 24 and len(outcome.lines) == 2
    for line, student in zip(outcome.lines, outcome.students, strict=True):
        assert line[0].kind == "base" and line[-1].id == student.candidate
        assert [child.parent for child in line[1:]] == [parent.id for parent in line[:-1]]


def test_report_leaves_the_archive_alone_and_can_be_written_again(folder):
    before, names = (folder / "archive.sqlite").read_bytes(), {each.name for each in folder.iterdir()}
    write_report(folder)
    first = (folder / "pareto.png").read_bytes()
    write_report(folder)
    assert (folder / "pareto.png").read_bytes() == first
    assert (folder / "archive.sqlite").read_bytes() == before
    assert {each.name for each in folder.iterdir()} == names | {"pareto.png", "report.html"}


def test_report_of_a_search_that_found_nothing_better(folder, single):
    del single["control"]
    single["students"][0] |= {"id": "000", **entry(0.36, 20.0, 1.0, 0)}
    (folder / "result.json").write_text(json.dumps(single | {"report": None, "selection": None}))
    text = page(read_outcome(folder))
    assert "takes 1.000 of the base&#x27;s time and misses the 0.53" in text and "(the control)" not in text


def test_a_control_that_failed_is_said(folder):
    text = _rewritten(folder, control={"failure": "the losses of step 3 are not finite."})
    assert "The control failed: the losses of step 3 are not finite." in text and "(the control)" not in text


@pytest.mark.parametrize(
    ("ratio", "target", "says"),
    [
        (0.8004, 0.8, "takes 0.8004 of the base's time and misses the 0.8 that"),
        (0.52996, 0.53, "takes 0.530 of the base's time; 0.53 was"),
        (0.5300001, 0.53, "takes 0.5300001 of the base's time and misses the 0.53 that"),
        (0.99, 0.9999999, "takes 0.990 of the base's time; 0.9999999 was"),
    ],
)
def test_the_verdict_never_contradicts_its_own_digits(single, ratio, target, says):
    single["students"][0] |= {"latency_ratio": ratio, "target": target, "target_met": ratio <= target}
    assert says in verdict(single)


def test_the_verdict_says_what_was_missed_where_an_map_was_asked_for(single):
    single["students"][0] |= {"latency_ratio": 0.5}
    said = "takes 0.500 of the base's time, but nothing within 0.53 has the mAP of 0.6 on the images that select."
    assert said in verdict(single | {"target_map": 0.6})


def test_page_shows_the_two_medians_that_make_a_ratio(folder, text):
    with closing(Archive(folder / "archive.sqlite")) as archive:
        (one,) = (one for one in archive.candidates if one.number == 3)
    assert f"<td>{one.latency_ratio:.3f}</td><td>{one.latency_p50:.2f} / 20.00</td>" in text


def test_table_fits_a_terminal_and_tells_the_target(single, folder):
    def shown(found):
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            console.print(result_table(found))
            return console.export_text()

    text = shown(single)
    assert "0.600 (0.590–0.612)" in text and "misses the 0.53" in text
    assert "control" in text and "Scores on 51 images, chosen on 50 others" in text
    assert result_table({"base": single["base"]}).row_count == 1
    assert "cannot be trusted" not in text
    text = " ".join(shown(single | {"aa": {"ratio": 0.94, "interval": [0.9, 0.98]}}).split())
    assert "misses the 0.53" in text and "cannot be trusted: timed against itself, the base takes 0.940" in text
    text = shown(result(read_outcome(folder).scored))
    assert "student 0.75" in text and "student 0.53" in text


def test_what_is_one_is_no_plural_and_what_was_not_measured_has_no_unit(single, tmp_path):
    folder = make_search(tmp_path / "young", finished=False, count=2)
    (said, *_) = summary(read_outcome(folder))
    assert re.match(r"This search is not finished: 1 candidate in 1 generation\b", said)
    table = result_table(single | {"control": {"failure": "the losses of step 31 are not finite"}})
    assert [*table.columns[5].cells] == ["1.80 M", "–", "1.08 M"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("archive.sqlite", None, r"archive\.sqlite does not exist or is empty"),
        ("archive.sqlite", b"", r"archive\.sqlite does not exist or is empty"),
        ("archive.sqlite", b"not a database at all, though long enough to be one" * 20, "no archive"),
        ("result.json", b"{", "is not JSON"),
        ("result.json", b"[]", "has no 'base'"),
        ("teachers.json", b"{", "is not JSON"),
    ],
)
def test_names_the_file_that_is_missing_or_broken_and_writes_nothing(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert not (folder / "pareto.png").exists() and not (folder / "report.html").exists()


def test_an_archive_without_a_candidate_is_refused(tmp_path):
    Archive(tmp_path / "archive.sqlite").close()
    with pytest.raises(InputError, match="holds no candidate yet"):
        write_report(tmp_path)
