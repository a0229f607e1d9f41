"""The parts of the GPU check on a CPU: smoke, benchmark process, plugin of pytest, carried extension."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import goals, harness, latency
from benchmarks.cases import pearson
from benchmarks.gpu import machine, reports, smoke, timed, verdicts
from benchmarks.gpu.plan import OPS, TIMED
from benchmarks.harness import Case
from jdkd import _ext
from jdkd.errors import InputError
from jdkd.ops import pearson_planner
from tests.detectors import detector, small_spec

ROOT = Path(__file__).resolve().parents[2]
UNNAMED = dict.fromkeys(("case", "mode", "dtype", "layout", "provider"), "")
HOPPER = (132, 232_448, 233_472, 16)
needs_planner = pytest.mark.skipif(_ext.library() is None, reason="jdkd._C is not built")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(printed):
    return [json.loads(line[3:]) for line in printed.splitlines() if line.startswith("@@ ")]


@pytest.fixture(autouse=True)
def settings():
    """Restores what a process of its own need not."""
    deterministic, tf32 = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.allow_tf32 = tf32


# The smoke


def smoked(out, *words):
    return smoke.main([*words, "--device", "cpu", "--brief", "--out", str(out)])


@pytest.mark.parametrize("name", ["pack", "pearson_single"])
def test_right_operators_pass_the_smoke(name, tmp_path):
    assert smoked(tmp_path / "rows", name) == 0
    rows = rows_of(tmp_path / "rows")
    assert rows and all(row["ok"] and row["op"] == name for row in rows)


def test_a_wrong_operator_fails_the_smoke_and_its_other_checks_go_on(tmp_path, monkeypatch, capsys):
    right = smoke.pack

    def wrong(weights, parts, dtype):
        views = right(weights, parts, dtype)
        views[2].flatten()[-1] += dtype == torch.float16
        return views

    monkeypatch.setattr(smoke, "pack", wrong)
    assert smoked(tmp_path / "rows", "pack") == 1
    rows = rows_of(tmp_path / "rows")
    assert {row["ok"] for row in rows if "float16" in row["check"] and "bfloat16" not in row["check"]} == {False}
    assert {row["ok"] for row in rows if "float32" in row["check"]} == {True}
    assert all("float16" in event["failed"] and "not what indexing gives" in event["why"]
               for event in events(capsys.readouterr().out))  # fmt: skip


def test_bits_that_change_are_found():
    counts = iter(range(9))
    with pytest.raises(AssertionError, match="repeat 3 has other bits"):
        smoke.equal_bits(lambda: [torch.tensor(float(next(counts) > 2))], 20)


def test_no_check_begins_after_its_time(tmp_path, capsys):
    assert smoked(tmp_path / "rows", "pack", "--until", "1") == 0
    assert rows_of(tmp_path / "rows") == [] and "not begun, out of time" in capsys.readouterr().out


@needs_planner
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("largest", [16, 8])
def test_levels_are_found_for_clusters_of_every_size(itemsize, largest):
    found = smoke.of_clusters(itemsize, (*HOPPER[:3], largest))
    assert [*found] == [size for size in smoke.CLUSTERS if size <= largest]
    for cluster, shape in found.items():
        assert pearson_planner.plan([shape], itemsize, (*HOPPER[:3], largest)).launches[0].cluster == cluster


def test_what_jdkd_finds_wrong_itself_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jdkd.check", SimpleNamespace(lines=lambda rows: [row.op for row in rows]))
    monkeypatch.setattr("jdkd.check", sys.modules["jdkd.check"], raising=False)
    made = [
        SimpleNamespace(
            op=op, form="forward", backend="cuda", dtype="x", state="wrong", what="", error="", is_wrong=bad
        )
        for op, bad in (("pack", False), ("pearson", True), ("late", True))
    ]
    assert verdicts.follow(made[:1], float("inf")) and not verdicts.follow(made, float("inf"))
    assert [event["failed"] for event in events(capsys.readouterr().out)] == [
        "pearson forward cuda x",
        "late forward cuda x",
    ]
    assert verdicts.follow(made, 0) and "out of time" in capsys.readouterr().out


def test_every_goal_of_a_gpu_but_the_sweep_is_timed(monkeypatch):
    monkeypatch.setattr(pearson, "compiled", lambda autotuned=False: {"torch.compile": pearson.batch_norm_loss})
    made = [case() for name in TIMED if name != "latency" for case in timed.cases(name, "cuda")]
    found = {(case.op, case.label, case.mode, str(case.dtype)[6:], case.layout) for case in made}
    for op, wanted in goals.GOALS.items():
        for goal in wanted:
            if goal.device == "cuda" and not isinstance(goal, goals.Overall):
                assert (op, goal.case, goal.mode, goal.dtype, goal.layout) in found


def test_every_operator_has_a_smoke():
    assert [*smoke.CHECKS] == [*OPS]
    for name in OPS:
        assert next(iter(smoke.CHECKS[name]("cpu", 2, True)), None) is not None, name


# The benchmark process


def twice(label, **providers):
    return Case(
        "twice", label, "forward", torch.float32, "NCHW", lambda: torch.ones(8), lambda given: [given * 2],
        {"eager": lambda given: [given + given], **providers}, 64,
    )  # fmt: skip


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Times cases of stand-ins for parts: the files of rows, and what was told."""

    def follow(skipped=0, until=float("inf"), **cases):
        monkeypatch.setattr(timed, "REHEARSED", {name: lambda made=made: made for name, made in cases.items()})
        monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 1 << 20})
        own = timed.Parts("cpu", tmp_path / "kernels", tmp_path / "latency")
        for name in cases:
            own.follow(name, until, skipped)
        return tmp_path / "kernels"

    return follow


def test_rows_of_a_case_are_there_before_the_next_is_made(parts, tmp_path):
    seen = []

    def second():
        seen.extend(row["case"] for row in rows_of(tmp_path / "kernels"))
        return twice("second")

    rows = rows_of(parts(pearson=[lambda: twice("first"), second]))
    assert seen == ["first"] and [row["case"] for row in rows] == ["first", "second"]


def test_a_wrong_provider_is_named_and_the_others_are_timed(parts, capsys):
    rows = rows_of(parts(pack=[lambda: twice("one", jdkd=lambda given: [given * 3]), lambda: twice("two")]))
    assert [(row["case"], row["provider"]) for row in rows] == [("one", "eager"), ("two", "eager")]
    (failed,) = (event for event in events(capsys.readouterr().out) if "failed" in event)
    assert failed["part"] == "pack" and "one" in failed["failed"] and "errs by" in failed["why"]


def test_a_case_that_cannot_be_made_takes_no_other_with_it(parts, capsys):
    broken = dataclasses.replace(twice("broken"), exact=lambda given: 1 / 0)
    rows = rows_of(parts(conv=[lambda: broken, lambda: twice("next")]))
    assert [row["case"] for row in rows] == ["next"] and "ZeroDivisionError" in capsys.readouterr().out


def test_no_case_begins_after_the_time_of_its_part_and_cases_are_skipped(parts, capsys):
    assert not parts(until=0, pack=[lambda: twice("late")]).exists()
    (end,) = (event for event in events(capsys.readouterr().out) if "end" in event)
    assert end["left"] == ["twice late float32 NCHW forward"]
    rows = rows_of(parts(skipped=1, pack=[lambda: twice("one"), lambda: twice("two")]))
    assert [row["case"] for row in rows] == ["two"]


def test_goals_are_told_of_operators_that_have_some():
    row = {"op": "twice", "cuda": "13", "device": "GPU"}
    assert timed.told([row]) == "" and "Goals of pack" in timed.told([row, {**row, "op": "pack"} | UNNAMED])


def test_every_part_has_cases_on_a_gpu_and_in_a_rehearsal():
    for name in TIMED:
        if name != "latency":
            assert timed.cases(name, "cuda") and timed.cases(name, "cpu"), name


def test_rows_of_latencies_come_one_mode_of_a_pair_at_a_time():
    models = {name: detector(small_spec()) for name in ("base", "student")}
    left = latency.turns(models, latency.grid_of(rounds=1, seconds=0, warmup_seconds=0))
    found = latency.measured(models, left, (64, 64), "cpu", "random")
    first = next(found)
    assert [row["mode"] for row in first] == ["end_to_end"] * 2
    assert all(row["samples"] or row["p50"] > 0 for row in first) and first[0]["ratio"] == 1
    assert all(row["control"]["n"] == 2 and len(row["facts"]["weights_sha256"]) == 64 for row in first)
    assert first[1]["verdict"] and first[1]["runtime"] == "eager" and first[1]["images"] == "noise"
    assert {row["mode"] for row in next(found)} == {"model_only"}
    assert next(found, None) is None


def test_a_changed_tree_publishes_no_latencies(monkeypatch):
    changed = {"version": "0", "commit": "0" * 40, "dirty": True}
    monkeypatch.setattr("benchmarks.record.sources", lambda root: changed)
    with pytest.raises(InputError, match="has changes since commit 000000000000"):
        latency.main(["--device", "cpu"])


def test_copies_are_of_random_bytes():
    drawn = harness.copied(4096, "cpu")
    assert drawn.dtype == torch.uint8 and len(drawn.unique()) > 200


# Tests and their rows


PLANTED = """
import pytest
@pytest.mark.parametrize("number", range(3))
def test_of(number):
    assert number != 1, "planted"
def test_that_ends_the_run():
    import os
    os._exit(3)
"""


def test_a_row_of_every_test_is_there_though_the_run_is_ended(tmp_path):
    (tmp_path / "test_planted.py").write_text(PLANTED)
    words = ["-p", "no:xdist", "-p", "benchmarks.gpu.reports", "--rows", tmp_path / "rows", "-p", "no:cacheprovider"]
    words += ["-c", os.devnull, "--rootdir", tmp_path, tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-m", "pytest", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 3, done.stdout + done.stderr
    rows = rows_of(tmp_path / "rows")
    assert [row["outcome"] for row in rows] == ["passed", "failed", "passed"] and "planted" in rows[1]["why"]


def test_a_worker_that_lost_the_device_ends_before_its_next_test(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    worker = reports.Worker()
    for failed, lost, expected in ((False, True, 0), (True, False, 0), (True, True, 1)):
        monkeypatch.setattr(reports, "_lost", lambda lost=lost: lost)
        worker.failed = failed
        worker.pytest_runtest_setup(None)
        assert len(ended) == expected


# The extension


def built(**facts: object) -> dict[str, object]:
    here = {"torch": torch.__version__, "arch_list": ["9.0a"], "cuda_ops": ["pack"], "sources": machine.sources()}
    return here | facts


@pytest.mark.parametrize(
    ("facts", "fits", "expected"),
    [
        ({}, True, "pack for 9.0a"),
        ({"torch": "2.99.0"}, True, "pack for 9.0a, built with torch 2.99.0"),
        ({"cuda_ops": [], "arch_list": []}, False, "no kernels for no GPU"),
        ({"sources": "0123"}, False, "pack for 9.0a, of sources 0123 where {} are here"),
    ],
)
def test_an_extension_fits_if_it_has_the_kernels_of_these_sources(monkeypatch, facts, fits, expected):
    monkeypatch.setattr(_ext, "build_info", lambda: built(**facts))
    assert machine.extension("cuda") == (expected.format(machine.sources()), fits)
