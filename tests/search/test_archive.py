"""The archive: append-only, whole after a crash, and the front it holds."""

import json
import math
import sqlite3
from contextlib import closing

import pytest

from jdkd.errors import InputError
from jdkd.pool import Subnet
from jdkd.search import Archive, Cycle
from jdkd.search.timing import pooled
from tests.search.rows import ARCHITECTURE, known, timing


def test_what_goes_in_comes_out_after_reopening(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        base = archive.add(timing(), **known(0, teacher=None, cycles=(), kind="base"))
        child = archive.add(timing(), **known(1, parent="000"))
        rows = [base, child]
        assert archive.candidates == rows
    with closing(Archive(tmp_path / "a.sqlite")) as again:
        assert again.candidates == rows
    assert child.cycles == (Cycle(5, 0, 10, 1e-3),) and child.teacher == Subnet((2, 2, 2, 2), (1.0, 0.5, 1.0, 1.0))


def test_a_number_is_archived_once(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        archive.add(timing(), **known(1))
        with pytest.raises(sqlite3.IntegrityError):
            archive.add(timing(), **known(1))
        assert len(archive) == len(archive.timings(ARCHITECTURE.id)) == 1, "neither the row nor its timing is kept"


def test_equal_architectures_have_equal_ratios_whatever_their_own_timing_said(tmp_path):
    first, second = timing((7.0, 6.8)), timing((6.4, 6.2))
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        archive.add(first, **known(1))
        other = archive.add(timing((5.0, 5.0), name="other"), **known(2, architecture_id="other"))
        archive.add(second, **known(3))
        one, unlike, two = archive.candidates
        both = pooled([first, second]).ratio
        assert one.latency_ratio == two.latency_ratio == both.value and one.latency_interval == both.interval
        assert unlike == other
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as raw:
        ratios = raw.execute("SELECT latency_ratio FROM candidates WHERE number != 2").fetchall()
        assert ratios == [(both.value,)] * 2
        kept = raw.execute(
            "SELECT samples, base_samples FROM timings WHERE architecture_id != 'other' ORDER BY number"
        ).fetchall()
    assert [tuple(map(tuple, map(json.loads, row))) for row in kept] == [
        (t.samples, t.base_samples) for t in (first, second)
    ]


def test_a_later_timing_brings_every_row_of_its_architecture_up_to_date(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        for number in (0, 1):
            archive.add(timing((7.0, 7.0)), **known(number))
        latency = archive.add_timing(timing((5.0,) * 40, (10.0,) * 40, stage="long"))
        shown = archive.candidates
    assert {c.latency_ratio for c in shown} == {latency.ratio.value} == {0.5}
    with closing(Archive(tmp_path / "a.sqlite")) as again:
        assert again.candidates == shown


def test_timings_of_two_machines_are_not_pooled(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        archive.add(timing((9.0, 9.0)), **known(1))
        archive.add_timing(timing((5.0, 5.0), device_name="another", stage="long"))
        assert archive.candidates[0].latency_ratio == 0.5
        here, another = (timing(device_name=name).machine for name in ("a cpu", "another"))
        asked = [(stage, where) for stage in ("brief", "long") for where in (here, another)]
        found = [archive.was_timed(ARCHITECTURE.id, *each) for each in asked]
        assert found == [True, False, False, True], "nor does one stand for the other"


def test_an_archive_of_an_earlier_version_is_refused_with_a_sentence(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as old:
        old.execute("CREATE TABLE candidates (number INTEGER PRIMARY KEY, latency_ratio REAL, latency_samples TEXT)")
    with pytest.raises(InputError, match=r"another version of jdkd \(format 1, here 4\).*another folder"):
        Archive(tmp_path / "a.sqlite")


def test_the_ratio_of_a_row_is_that_of_the_medians_in_it(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        for number, speed in enumerate((1.0, 1.3)):
            one = timing((7.0 * speed,) * 2, (10.0 * speed,) * 2, name=f"{number}")
            archive.add(one, **known(number, architecture_id=one.architecture_id))
        archive.add_timing(timing((3.0, 4.0), (5.0, 5.5), name="0"))
        for one in archive.candidates:
            assert one.latency_ratio == pytest.approx(one.latency_p50 / one.base_latency_p50, rel=1e-12)


def test_a_candidate_that_failed_has_no_numbers_and_takes_none_from_its_architecture(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        archive.add(timing(), **known(0))
        archive.add(None, **known(1, map=math.nan, map50=math.nan, failure="training diverged."))
        archive.add_timing(timing())
        failed = archive.candidates[1]
        assert archive.scored == archive.candidates[:1] and len(archive) == 2
    with closing(Archive(tmp_path / "a.sqlite")) as again:
        for one in (failed, again.candidates[1]):
            assert one.failure == "training diverged."
            assert all(map(math.isnan, (one.map, one.map50, one.latency_p50, one.latency_ratio)))


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_a_measurement_that_is_no_time_is_refused(ms):
    for samples in ({"samples": (7.0, ms)}, {"base": (ms, 7.0)}):
        with pytest.raises(InputError, match=f"timed at {ms} ms; mend the clock"):
            timing(**samples)


def test_a_slow_call_among_many_moves_no_ratio(tmp_path):
    assert pooled([timing((7.0,) * 39 + (1e6,), (10.0,) * 40)]).ratio.value == 0.7


def test_an_archive_that_another_process_holds_is_no_foreign_file(tmp_path, monkeypatch):
    Archive(tmp_path / "a.sqlite").close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file: connect(file, timeout=0.0))
    with closing(connect(tmp_path / "a.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match=r"a\.sqlite cannot be opened \(database is locked\).*then resume"):
            Archive(tmp_path / "a.sqlite")


def test_a_row_that_cannot_be_read_is_named(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        archive.add(timing(), **known(0))
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as raw, raw:
        raw.execute("UPDATE candidates SET cycles = '[{'")
    with pytest.raises(InputError, match=r"a\.sqlite holds a row that cannot be read"):
        Archive(tmp_path / "a.sqlite")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM candidates WHERE number = 0",
        "DELETE FROM candidates WHERE number = 1",
        "UPDATE candidates SET parent = 'nobody' WHERE number = 2",
        "UPDATE candidates SET number = 3 WHERE number = 2",
        "UPDATE candidates SET architecture = 'x' WHERE number = 1",
        "DELETE FROM timings",
        "UPDATE timings SET samples = '[]'",
        "UPDATE timings SET base_samples = '[1.0, 0.0]'",
        "UPDATE timings SET samples = '[\"fast\"]'",
    ],
)
def test_an_archive_that_lacks_a_part_is_refused_and_named(tmp_path, damage):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        for number in range(3):
            archive.add(timing(), **known(number, parent=f"{number - 1:03d}" if number else None))
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as raw, raw:
        raw.execute(damage)
    with pytest.raises(InputError, match=r"a\.sqlite holds a row that cannot be read \(.*\); search into another"):
        Archive(tmp_path / "a.sqlite")
    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as raw, raw:
        raw.execute("DROP TABLE timings")
    with pytest.raises(InputError, match=r"a\.sqlite"):
        Archive(tmp_path / "a.sqlite")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.sqlite").write_text("no database, but long enough to be read as the header of one " * 4)
    with pytest.raises(InputError, match="no archive of a search"):
        Archive(tmp_path / "a.sqlite")
