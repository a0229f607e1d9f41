"""torchrun -m jdkd: what it starts writes once, survives a kill, and carries on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TRAIN = ("--model", "fasterrcnn:resnet18", "--width", 0.125, "--min-size", 64, "--max-size", 64, "--batch-size", 2)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("when_asked")]


def torchrun(*words, restarts=0):
    """Two processes on this machine, under way."""
    started = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*started, "--max-restarts", str(restarts), "-m", "jdkd", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, **pipes)


def kill_a_rank_when(process, is_time):
    """Ends the second process of two, as the kernel does when memory runs out."""
    ends = time.monotonic() + 180
    while not is_time():
        assert time.monotonic() < ends and process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if "RANK=1" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError("there is no second process")


def steps_of(out):
    file = out / "log.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def flags_of(digits):
    return ("--data", digits[0].split.images.parent, "--device", "cpu", "--checkpoint-every", 5)


def test_a_killed_rank_ends_the_run_with_a_whole_checkpoint_and_a_restart_carries_on(digits, tmp_path):
    words = ("train", "--out", tmp_path / "out", *TRAIN, *flags_of(digits), "--steps", 60, "--amp", "bf16")
    process = torchrun(*words, restarts=1)
    kill_a_rank_when(process, lambda: len(steps_of(tmp_path / "out")) >= 3)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    steps = steps_of(tmp_path / "out")
    assert steps == sorted(set(steps)) and steps[-1] == 60, "what the restart took again is in the log once"
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["train_steps"] == 60 and len(record["per_class"]) == 10
    assert said.count("IoU=0.50:0.95 | area=   all | maxDets=100") == 2, "AP and AR, by one process"


def test_without_a_restart_the_run_ends_and_resumes(digits, tmp_path):
    words = ("train", "--out", tmp_path / "out", *TRAIN, *flags_of(digits), "--steps", 40, "--accumulate", 2)
    process = torchrun(*words)
    kill_a_rank_when(process, lambda: len(steps_of(tmp_path / "out")) >= 3)
    said, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert 5 <= state["step"] < 40 and state["config"]["processes"] == 2 and state["config"]["accumulate"] == 2
    process = torchrun(*words, "--resume")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert steps_of(tmp_path / "out")[-1] == 40


def test_a_pool_is_trained_and_scored_by_both(digits, tmp_path):
    process = torchrun("train", "--out", tmp_path / "base", *TRAIN, *flags_of(digits), "--steps", 2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    how = ("--steps", 8, "--batch-size", 1, "--subnets", 2)
    words = ("pool", "train", "--base", tmp_path / "base", "--out", tmp_path / "pool", *flags_of(digits), *how)
    process = torchrun(*words)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert len(json.loads((tmp_path / "pool" / "pool.json").read_text())["members"]) == 2
    assert said.count("M parameters") == 2
    process = torchrun(*words)
    said, _ = process.communicate(timeout=200)
    assert (
        process.returncode != 0
        and "already holds a run" in said
        and "Traceback (most recent call last)" not in (said.partition("torch/distributed")[0])
    )


def test_a_student_is_taught_by_both_through_one_adapter(digits, tmp_path):
    process = torchrun("train", "--out", tmp_path / "teacher", *TRAIN, *flags_of(digits), "--steps", 2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    pair = ("--teacher", tmp_path / "teacher", "--student", TRAIN[1], *TRAIN[2:], "--fpn", 16)
    process = torchrun("distill", *pair, "--out", tmp_path / "student", *flags_of(digits), "--steps", 3)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("through a trained 1x1 adapter, from 8 channels to 32") == 1, "by one process"
    state = torch.load(tmp_path / "student" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and state["config"]["processes"] == 2
    assert {tuple(weight.shape) for weight in state["auxiliary"].values()} == {(32, 8, 1, 1)}
    summary = json.loads((tmp_path / "student" / "distill.json").read_text())
    assert summary["train_steps"] == 3 and summary["losses"]["loss_pkd"] > 0
