"""Whatever of a search is killed, and whenever: no finished candidate is lost or made again, the end is the same."""

import json
import os
import signal
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from jdkd.search import search
from jdkd.search.archive import ARCHIVE
from tests.execution.killing import killed_until_through
from tests.search.killed_search import killed_config, make_workers_steady
from tests.search.small_search import archived

KILLS = int(os.environ.get("JDKD_TEST_KILLS", "2"))  # 20 is what the package promises
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("when_asked")]


def finished(out) -> set[int]:
    """The candidates that are in the archive, or whose outcome is kept."""
    kept = {json.loads(file.read_text())["job"]["number"] for file in (out / "outcomes").glob("[!.]*.json")}
    try:
        return kept | {number for (number,) in archived(out, "number")}
    except sqlite3.OperationalError:  # it has not been laid out
        return kept


def command(folder, out):
    return [sys.executable, "-m", "tests.search.killed_search", str(folder), str(out)]


@pytest.fixture(scope="module")
def undisturbed(when_asked, folder):
    """Folder of a search by two workers that nobody killed."""
    killed_until_through(command(folder, folder / "undisturbed"), [], lambda: set())
    return folder / "undisturbed"


def assert_equal(out, undisturbed):
    assert archived(out) == archived(undisturbed)
    with closing(sqlite3.connect(out / ARCHIVE)) as archive:
        (count,) = archive.execute("SELECT count(*) FROM timings WHERE stage = 'brief'").fetchone()
    assert count == len(archived(out, "number")), "every candidate was timed and archived once"
    for name in ("base", "students", "control"):
        ours, theirs = (json.loads((where / "result.json").read_text())[name] for where in (out, undisturbed))
        assert ours == theirs


def test_kills_at_random_moments_change_nothing(folder, undisturbed):
    victims, searches = [("worker", "driver")[kill % 2] for kill in range(KILLS)], 0
    while victims:  # who is left when a search is through is killed in another
        out = folder / f"killed-at-random-{searches}"
        told = killed_until_through(command(folder, out), victims, lambda out=out: finished(out), seed=searches)
        assert told.killed, "somebody was"
        victims, searches = victims[len(told.killed) :], searches + 1
        assert_equal(out, undisturbed)
        for before, lines in zip(told.before, told.lines, strict=True):
            again = [line for number in before for line in lines if line.startswith(f"candidate {number}:")]
            assert again == [], "nothing finished is trained again"


@pytest.mark.filterwarnings("default", "ignore:.*hold no box of:jdkd.notices.Notice")
def test_a_ray_cluster_that_loses_a_worker_changes_nothing(folder, undisturbed, monkeypatch):
    ray = pytest.importorskip("ray")
    out, killed = folder / "on-ray", []

    def kill_one(what, *state):
        if what.startswith("candidate 2:") and not killed:
            killed.append(next(iter(at_work())))
            os.kill(killed[0], signal.SIGKILL)

    make_workers_steady(monkeypatch)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        search(killed_config(folder, out, ray="auto"), kill_one)
    finally:
        torch.set_num_threads(threads)
        ray.shutdown()
    assert killed
    assert_equal(out, undisturbed)


def at_work() -> list[int]:
    """The Ray workers that have a job."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::_answer"):
                found.append(int(process.name))
    return found
