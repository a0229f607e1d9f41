import json
import random
import re
from contextlib import closing

import pytest
from rich.console import Console

from jdkd.errors import InputError
from jdkd.pool import Subnet
from jdkd.report import read_outcome, result_table, verdict, write_report
from jdkd.rewrite import Architecture
from jdkd.search.archive import Archive, Cycle
from jdkd.search.timing import Timing

ARCHITECTURE = Architecture("my.nets:make", classes=("a", "b"))


def _added(archive, number, score, ratio, parent=None, kind="morph", action="prune 20 % of <inner> & FPN"):
    own = 0 if parent is None else 100
    environment = {"device": "cpu", "device_name": "a cpu", "threads": 1, "torch": "2.11"}
    timing = Timing(f"spec {number}", "brief", environment, (20 * ratio,) * 4, (20.0,) * 4)
    return archive.add(
        timing,
        number=number,
        id=f"{number:03d}",
        parent=None if parent is None else f"{parent:03d}",
        kind=kind,
        action=action,
        teacher=None if parent is None else Subnet((3, 4, 6, 3), (1.0, 1.0, 0.5, 0.5)),
        architecture=ARCHITECTURE,
        feature_channels=((0, 1, 2),),
        map=score,
        map50=min(1, 1.7 * score),
        architecture_id=f"spec {number}",
        steps=own,
        lineage_steps=own * number,
        cycles=() if parent is None else (Cycle(100, 0, 300, 2e-3),),
        params=int(1.8e6 * ratio),
        gmacs=0.41 * ratio,
        seconds=12.5,
    )


def _fill(archive, count=24):
    generator = random.Random(0)
    _added(archive, 0, 0.38, 1.0, kind="base", action="base")
    for number in range(1, count):
        ratio = generator.uniform(0.5, 1.05)
        score = 0.30 + 0.2 * ratio**0.5 + generator.gauss(0, 0.02)
        kind = generator.choice(["morph", "teacher"])
        _added(archive, number, score, ratio, generator.randrange(number), kind)


def _entry(score, p50, ratio, steps):
    return {
        "map": score,
        "map50": score * 1.7,
        "latency_ms": {"p50": p50, "p90": 1.1 * p50, "p99": 1.4 * p50},
        "latency_ratio": ratio,
        "latency_ratio_interval": [ratio - 0.01, ratio + 0.012],
        "params": int(1.8e6 * ratio),
        "gmacs": 0.41 * ratio,
        "train_steps": steps,
    }


def _part(images, boxes, which):
    where = {"image_folder": "data/val2017", "annotations": "data/instances_val2017.json"}
    return {**where, "which": which, "images": images, "boxes": boxes}


@pytest.fixture
def result():
    return {
        "base": _entry(0.36, 20.0, 1.0, 400),
        "control": _entry(0.44, 20.0, 1.0, 700),
        "control_single": _entry(0.46, 20.1, 1.003, 700),
        "student": _entry(0.49, 12.0, 0.6, 700),
        "selection": _part(50, 120, "half, the lower SHA-256 of image files"),
        "report": _part(51, 130, "half, the higher SHA-256 of image files"),
        "seed": 0,
        "device": "cpu",
        "versions": {"torch": "2.11.0", "jdkd": "0.1.0"},
        "command": ["jdkd", "search", "--base", "a folder"],
        "target_latency": 0.53,
        "target_met": False,
        "student_id": "007",
        "seconds": 345.6,
    }


@pytest.fixture
def folder(tmp_path, result):
    with closing(Archive(tmp_path / "archive.sqlite")) as archive:
        _fill(archive)
    (tmp_path / "result.json").write_text(json.dumps(result))
    return tmp_path


def test_page_stands_alone(folder):
    plot, page = write_report(folder)
    text = page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert 'src="data:image/png;base64,iVBOR' in text
    outside = re.sub(r"base64,[^\"]*", "", text)
    for forbidden in ("http", "<script", "<link", "@import", "url(", "$"):
        assert forbidden not in outside
    assert 'name="viewport"' in text


def test_page_says_what_there_is_to_say(folder):
    text = write_report(folder)[1].read_text()
    assert text.count("<tr") == 1 + 4 + 1 + 24 + 1 + 6  # a heading and its rows, three times
    assert "takes 0.600 of the base&#x27;s time and misses the 0.53" in text
    assert "jdkd search --base &#x27;a folder&#x27;" in text
    assert "prune 20 % of &lt;inner&gt; &amp; FPN, taught by 3x1 4x1 6x0.5 3x0.5" in text
    assert "0.600 (0.590–0.612)" in text and "12.0 / 13.2 / 16.8" in text
    where = "of data/instances_val2017.json in data/val2017"
    assert f"chose on 50 images with 120 boxes {where} (half, the lower SHA-256 of image files)" in text
    assert f"result below is of 51 images with 130 boxes {where} (half, the higher SHA-256" in text


def test_report_leaves_the_archive_alone_and_can_be_written_again(folder):
    before = (folder / "archive.sqlite").read_bytes()
    write_report(folder)
    first = (folder / "pareto.png").read_bytes()
    write_report(folder)
    assert (folder / "pareto.png").read_bytes() == first
    assert (folder / "archive.sqlite").read_bytes() == before
    names = {"archive.sqlite", "result.json", "pareto.png", "report.html"}
    assert {entry.name for entry in folder.iterdir()} == names


def test_report_of_a_search_that_found_nothing_better(folder, result):
    for name in ("control", "control_single"):
        del result[name]
    result |= {"student_id": "000", "student": {**result["base"], "latency_ratio_interval": None}}
    (folder / "result.json").write_text(json.dumps(result))
    assert "control, one cycle" not in write_report(folder)[1].read_text()


def test_outcome_has_the_lineage_from_the_base_to_the_student(folder):
    outcome = read_outcome(folder)
    assert len(outcome.candidates) == 24
    assert outcome.line[0].kind == "base" and outcome.line[-1].id == "007"
    assert [child.parent for child in outcome.line[1:]] == [parent.id for parent in outcome.line[:-1]]


@pytest.mark.parametrize(
    ("ratio", "target", "says"),
    [
        (0.8004, 0.8, "takes 0.8004 of the base's time and misses the 0.8 that"),
        (0.52996, 0.53, "takes 0.530 of the base's time; 0.53 was"),
        (0.5300001, 0.53, "takes 0.5300001 of the base's time and misses the 0.53 that"),
        (0.99, 0.9999999, "takes 0.990 of the base's time; 0.9999999 was"),
    ],
)
def test_the_verdict_never_contradicts_its_own_digits(result, ratio, target, says):
    result["student"]["latency_ratio"] = ratio
    assert says in verdict(result | {"target_latency": target, "target_met": ratio <= target})


def test_page_shows_the_two_medians_that_make_a_ratio(folder):
    with closing(Archive(folder / "archive.sqlite")) as archive:
        (one,) = (one for one in archive.candidates if one.number == 3)
    text = write_report(folder)[1].read_text()
    assert f"<td>{one.latency_ratio:.3f}</td><td>{one.latency_p50:.2f} / 20.00</td>" in text


def test_table_fits_a_terminal_and_tells_the_target(result):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(result_table(result))
        text = console.export_text()
    assert "0.600 (0.590–0.612)" in text and "misses the 0.53" in text
    assert "control_single" in text and "Scores on 51 images, chosen on 50 others" in text
    assert result_table({"base": result["base"]}).row_count == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("archive.sqlite", None, r"archive\.sqlite does not exist"),
        ("archive.sqlite", b"not a database at all, though long enough to be one" * 20, "no archive"),
        ("result.json", None, r"result\.json does not exist"),
        ("result.json", b"{", "is not JSON"),
        ("result.json", b"[]", "has no 'base'"),
    ],
)
def test_names_the_file_that_is_missing_or_broken_and_writes_nothing(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert not (folder / "pareto.png").exists() and not (folder / "report.html").exists()
