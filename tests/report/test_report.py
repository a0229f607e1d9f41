import json
import random
import re
import sqlite3
from contextlib import closing

import pytest
from rich.console import Console

from jdkd.errors import InputError
from jdkd.report import Candidate, front, lineage, read_archive, result_table, write_report

COLUMNS = (
    "number INTEGER PRIMARY KEY, id TEXT, parent TEXT, action TEXT, teacher TEXT, spec TEXT, map REAL, "
    "map50 REAL, latency_p50 REAL, latency_ratio REAL, latency_samples TEXT, steps INTEGER, "
    "lineage_steps INTEGER, cycles TEXT, params INTEGER, gmacs REAL, kind TEXT, seconds REAL"
)


def _row(number, parent, action, kind, score, ratio, teacher=None):
    identity = f"{number:064x}"
    depth = 0 if parent is None else 100
    return (
        *(number, identity, parent, action, teacher, json.dumps({"fpn": 64}), score, min(1, score * 1.7)),
        *(
            20 * ratio,
            ratio,
            json.dumps([20 * ratio] * 4),
            depth,
            depth * number,
            json.dumps([[depth, 2e-3]]),
        ),
        *(int(1.8e6 * ratio), 0.41 * ratio, kind, 12.5),
    )


def _rows(count=24):
    generator = random.Random(0)
    rows = [_row(0, None, "the base", "base", 0.38, 1.0)]
    for number in range(1, count):
        kind = generator.choice(["morph", "teacher"])
        ratio = generator.uniform(0.5, 1.05)
        score = 0.30 + 0.2 * ratio**0.5 + generator.gauss(0, 0.02)
        parent = f"{generator.randrange(number):064x}"
        rows.append(_row(number, parent, "prune 20 % of <inner> & FPN", kind, score, ratio, "pool 3-4-6-3"))
    return rows


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


@pytest.fixture
def result():
    return {
        "base": _entry(0.36, 20.0, 1.0, 400),
        "control": _entry(0.44, 20.0, 1.0, 700),
        "control_single": _entry(0.46, 20.1, 1.003, 700),
        "student": _entry(0.49, 12.0, 0.6, 700),
        "seed": 0,
        "device": "cpu",
        "versions": {"torch": "2.11.0", "jdkd": "0.1.0"},
        "command": ["jdkd", "search", "--base", "a folder"],
        "target_latency": 0.53,
        "target_met": False,
        "student_id": f"{7:064x}",
        "seconds": 345.6,
    }


@pytest.fixture
def folder(tmp_path, result):
    with closing(sqlite3.connect(tmp_path / "archive.sqlite")) as connection:
        connection.execute(f"CREATE TABLE candidates ({COLUMNS})")
        connection.executemany(f"INSERT INTO candidates VALUES ({', '.join('?' * 18)})", _rows())
        connection.commit()
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
    assert "No candidate met the asked latency of 0.53 of the base&#x27;s" in text
    assert "jdkd search --base &#x27;a folder&#x27;" in text
    assert "prune 20 % of &lt;inner&gt; &amp; FPN, taught by pool 3-4-6-3" in text
    assert "0.600 (0.590–0.612)" in text and "12.0 / 13.2 / 16.8" in text


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
    result |= {"student_id": f"{0:064x}", "student": {**result["base"], "latency_ratio_interval": None}}
    (folder / "result.json").write_text(json.dumps(result))
    assert "control, one cycle" not in write_report(folder)[1].read_text()


def _candidate(number, score, ratio, parent=None):
    row = _row(number, parent, "x", "morph", score, ratio)
    names = Candidate.__dataclass_fields__
    return Candidate(**dict(zip(names, row, strict=True)))


def test_front_keeps_what_nothing_beats():
    points = [(0.5, 1.0), (0.4, 0.7), (0.4, 0.8), (0.45, 0.9), (0.5, 1.0), (0.3, 0.6), (0.44, 0.95)]
    candidates = [_candidate(number, *point) for number, point in enumerate(points)]
    assert [one.number for one in front(candidates)] == [5, 1, 3, 0]


def test_lineage_goes_from_the_base_to_the_student_and_ends_on_a_cycle():
    first, second = f"{0:064x}", f"{1:064x}"
    chain = [_candidate(0, 0.3, 1.0), _candidate(1, 0.3, 1.0, first), _candidate(2, 0.3, 1.0, second)]
    assert [one.number for one in lineage(chain, chain[2].id)] == [0, 1, 2]
    assert lineage(chain, "unknown") == [] and lineage(chain, None) == []
    loop = [_candidate(0, 0.3, 1.0, second), _candidate(1, 0.3, 1.0, first)]
    assert len(lineage(loop, first)) == 2


def test_table_fits_a_terminal_and_tells_the_target(result):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(result_table(result))
        text = console.export_text()
    assert "0.600 (0.590–0.612)" in text and "No candidate met the asked latency" in text
    assert "control_single" in text
    assert result_table({"base": result["base"]}).row_count == 1


def test_archive_round_trip(folder):
    candidates = read_archive(folder / "archive.sqlite")
    assert len(candidates) == 24 and candidates[0].kind == "base" and candidates[0].parent is None
    assert candidates[3].spec == {"fpn": 64} and len(candidates[3].latency_samples) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("archive.sqlite", None, r"archive\.sqlite does not exist"),
        ("archive.sqlite", b"not a database at all, though long enough to be one" * 20, "not the archive"),
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
