"""The joint search from end to end, in miniature."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from jdkd.data import resolve_splits, write_digit_scenes
from jdkd.detect import load, save
from jdkd.errors import InputError
from jdkd.search import SearchConfig, plan, search
from jdkd.search.archive import ARCHIVE
from tests.detectors import detector, small_spec

DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_digit_scenes(folder / "data", train=16, val=4, size=64, seed=0)
    save(folder / "base", detector(small_spec(classes=DIGITS)))
    return folder


def config_of(folder, out, **changes) -> SearchConfig:
    train, val = resolve_splits(folder / "data")
    small = SearchConfig(
        folder / "base", train, val, out, target_latency=0.95, steps=40, candidates=2, proposals=2, batch_size=2,
        lr=1e-4, latency_rounds=2, latency_seconds=0.0,
    )  # fmt: skip
    return replace(small, **changes)


@pytest.fixture(scope="module")
def finished(folder):
    """Folder and result of a search that ran to its end, and what it told of its progress."""
    told = set()
    result = search(config_of(folder, folder / "out"), lambda what, done, total, values: told.add(what))
    return folder / "out", result, told


def archived(out, columns="*") -> list[tuple]:
    with closing(sqlite3.connect(out / ARCHIVE)) as archive:
        return archive.execute(f"SELECT {columns} FROM candidates").fetchall()


def test_a_search_leaves_a_student_a_result_and_an_archive(folder, finished):
    out, result, told = finished
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    budget = plan(config_of(folder, out), 14)
    for name in ("base", "control", "control_single", "student"):
        row = result[name]
        assert {"map", "map50", "latency_ms", "params", "gmacs", "train_steps"} <= row.keys()
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        assert row["latency_ratio_interval"][0] <= row["latency_ratio"] <= row["latency_ratio_interval"][1]
    assert (
        result["control"]["train_steps"] == result["student"]["train_steps"] == result["control_single"]["train_steps"]
    )
    assert result["target_met"] is (result["student"]["latency_ratio"] <= 0.95)
    student = load(out / "student")
    rows = (
        sqlite3.connect(out / ARCHIVE)
        .execute("SELECT number, kind, parent, steps, spec, id FROM candidates")
        .fetchall()
    )
    assert [row[:2] for row in rows] == [(0, "base"), (1, "morph"), (2, "teacher")]
    assert [row[3] for row in rows] == [0, budget.per_candidate, budget.per_candidate]
    assert student.spec.to_json(indent=None) in [row[4] for row in rows if row[5] == result["student_id"]]
    assert {"pool: largest", "pool: full", "screening students", "control", "timing"} <= told
    assert not list(out.glob("candidates/*/training")), "what only a resume needs is cleared away"


RUN = """
import sys
from pathlib import Path
from dataclasses import replace
sys.path.insert(0, {root!r})
from tests.search.test_search import config_of
from jdkd.search import search
folder = Path({folder!r})
def tell(what, done, total, values):
    print(what, done, flush=True)
search(config_of(folder, folder / "killed", resume={resume}), tell)
"""


def start(folder, resume: bool) -> subprocess.Popen:
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    code = RUN.format(root=root, folder=str(folder), resume=resume)
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy core would spin
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=alone)


def test_a_killed_search_resumes_and_archives_every_candidate_once(folder):
    with start(folder, resume=False) as process:
        for line in process.stdout:
            if line.startswith("candidate 2"):
                break
        process.send_signal(signal.SIGKILL)
    before = archived(folder / "killed")
    assert [row[0] for row in before] == [0, 1]
    assert not (folder / "killed" / "result.json").exists()
    with start(folder, resume=True) as process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert not any(line.startswith(("pool: largest", "candidate 1:")) for line in lines), "nothing finished is redone"
    after = archived(folder / "killed")
    assert after[:2] == before and [row[0] for row in after] == [0, 1, 2]
    assert (folder / "killed" / "result.json").exists()


def test_a_finished_pool_serves_another_search(folder, finished):
    pool, out = finished[0] / "pool", folder / "again"
    before = (pool / "pool.json").stat().st_mtime_ns
    result = search(config_of(folder, out, teacher_pool=pool, seed=1, steps=12))
    assert result["seed"] == 1 and not (out / "pool").exists()
    assert (pool / "pool.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3}, "steps is 3, too few"),
        ({"target_latency": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"target_latency": 1.5}, "got 1.5"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
    ],
)
def test_a_search_that_cannot_be_planned_is_refused_before_anything_is_written(folder, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        search(config_of(folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_classes_is_refused(folder, tmp_path):
    save(tmp_path / "base", detector(small_spec()))
    with pytest.raises(InputError, match=r"3 \(cat, dog, bird\).*10 \(0, 1, 2, 3, 4, ...\)"):
        search(config_of(folder, tmp_path / "out", base=tmp_path / "base"))


def test_the_budget_covers_pool_candidates_and_both_controls(folder):
    config = config_of(folder, folder / "none", steps=1200, candidates=4)
    budget = plan(config, 100)
    assert 1150 <= budget.total <= 1200 and budget.pool == 432
    assert plan(replace(config, steps=None), 1000).total <= 36 * 1000 // 2
    assert plan(replace(config, teacher_pool=folder), 100).pool == 0


def test_a_finished_search_is_read_and_not_measured_again(folder, finished):
    out, result, _ = finished
    before = (out / "result.json").stat().st_mtime_ns
    again = search(config_of(folder, out, resume=True), lambda *state: pytest.fail("something was done"))
    assert again == json.loads(json.dumps(result))
    assert (out / "result.json").stat().st_mtime_ns == before


def test_a_folder_that_holds_another_search_is_refused(folder, finished):
    with pytest.raises(InputError, match="holds another search"):
        search(config_of(folder, finished[0], seed=7))
