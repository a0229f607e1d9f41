"""The archive: append-only, whole after a crash, and the front it holds."""

import sqlite3
from contextlib import closing

import pytest

from jdkd.errors import InputError
from jdkd.pool import Subnet
from jdkd.search import Archive, Candidate, Cycle, pareto_front
from jdkd.search.loop import fitness
from jdkd.search.outcome import choose
from tests.detectors import small_spec


def candidate(number=0, *, map=0.4, ratio=1.0, parent=None, **changes) -> Candidate:
    known = {
        "number": number, "id": f"{number:03d}", "parent": parent, "kind": "morph", "action": "prune", "map": map,
        "teacher": Subnet((2, 2, 2, 2), (1.0, 0.5, 1.0, 1.0)), "spec": small_spec(), "feature_channels": (0, 3),
        "map50": 0.6, "latency_p50": 20.0, "latency_ratio": ratio, "latency_samples": (19.5, 20.5), "steps": 5,
        "lineage_steps": 5, "cycles": (Cycle(5, 0, 10, 1e-3),), "params": 7, "gmacs": 0.5, "seconds": 1.0,
    }  # fmt: skip
    return Candidate(**known | changes)


def test_what_goes_in_comes_out_after_reopening(tmp_path):
    rows = [candidate(0, teacher=None, cycles=()), candidate(1, parent="000")]
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        for row in rows:
            archive.add(row)
    with closing(Archive(tmp_path / "a.sqlite")) as again:
        assert again.candidates == rows
        assert again.lineage(rows[1]) == rows


def test_a_number_is_archived_once(tmp_path):
    with closing(Archive(tmp_path / "a.sqlite")) as archive:
        archive.add(candidate(1))
        with pytest.raises(sqlite3.IntegrityError):
            archive.add(candidate(1))
        assert len(archive) == 1


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.sqlite").write_text("no database, but long enough to be read as the header of one " * 4)
    with pytest.raises(InputError, match="no archive of a search"):
        Archive(tmp_path / "a.sqlite")


def test_the_front_holds_what_nothing_beats():
    a, b, c, d = (
        candidate(0, map=0.40, ratio=1.0),
        candidate(1, map=0.38, ratio=0.8),
        candidate(2, map=0.37, ratio=0.9),
        candidate(3, map=0.41, ratio=1.1),
    )
    assert pareto_front([a, b, c, d]) == [b, a, d]


def test_the_student_is_the_best_that_meets_the_target_or_the_fastest():
    slow, fast, faster = (candidate(i, map=m, ratio=r) for i, (m, r) in enumerate(((0.5, 0.9), (0.4, 0.7), (0.3, 0.6))))
    assert choose([slow, fast, faster], target=0.8) is fast
    assert choose([slow, fast, faster], target=0.5) is faster
    assert fitness(fast, 0.7) == fast.map and fitness(slow, 0.7) < slow.map
