"""Whatever of a search is killed, and whenever: no finished candidate is lost or made again, the end is the same."""

import json
import os
import sqlite3
import sys
from contextlib import closing

import pytest

from jdkd.search.archive import ARCHIVE
from tests.execution.killing import killed_until_through
from tests.search.small_search import archived

KILLS = int(os.environ.get("JDKD_TEST_KILLS", "2"))  # 20 is what the package promises
DECIDED = "number, id, parent, generation, kind, action, teacher, architecture, map, map50, latency_ratio, cycles"
pytestmark = pytest.mark.slow


def finished(out) -> set[int]:
    """The candidates that are in the archive, or whose outcome is kept."""
    kept = {json.loads(file.read_text())["job"]["number"] for file in (out / "outcomes").glob("[!.]*.json")}
    try:
        return kept | {number for (number,) in archived(out, "number")}
    except sqlite3.OperationalError:  # it has not been laid out
        return kept


def command(folder, out):
    return [sys.executable, "-m", "tests.search.killed_search", str(folder), str(out), "2"]


def test_kills_at_random_moments_change_nothing(folder):
    undisturbed, out = folder / "undisturbed", folder / "killed-at-random"
    killed_until_through(command(folder, undisturbed), [], lambda: set())
    victims = [("worker", "driver")[kill % 2] for kill in range(KILLS)]
    told = killed_until_through(command(folder, out), victims, lambda: finished(out))
    assert told.killed, "somebody was"
    assert archived(out, DECIDED) == archived(undisturbed, DECIDED)
    with closing(sqlite3.connect(out / ARCHIVE)) as archive:
        (count,) = archive.execute("SELECT count(*) FROM timings WHERE stage = 'brief'").fetchone()
    assert count == len(archived(out, "number")), "every candidate was timed and archived once"
    for before, lines in zip(told.before, told.lines, strict=True):
        again = [line for number in before for line in lines if line.startswith(f"candidate {number}:")]
        assert again == [], "nothing finished is trained again"
    for name in ("base", "student", "control"):
        ours, theirs = (json.loads((where / "result.json").read_text())[name] for where in (out, undisturbed))
        assert ours == theirs
