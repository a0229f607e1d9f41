"""No two processes write to one folder."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest

from jdkd import run_folder
from jdkd.cli.report import Report
from jdkd.errors import InputError
from jdkd.files import LOCK, lock_folder, unlock_folder
from jdkd.run_folder import RunFolder
from tests.report.made_up import make_search

HOLDER = """
import sys, types
sys.modules["jdkd"] = types.ModuleType("jdkd")  # without torch, which takes long to load
sys.modules["jdkd"].__path__ = ["jdkd"]
from jdkd.run_folder import RunFolder
run = RunFolder(sys.argv[1])
run.begin("search", {"steps": 10}, resume=True)
print("at work", flush=True)
for line in sys.stdin:
    run.finish() if line == "finish\\n" else run.close()
    print(line, flush=True)
"""


@contextmanager
def at_work(folder):
    """Another process that has begun or resumed a search in the folder."""
    command, root = [sys.executable, "-c", HOLDER, str(folder)], Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


def tell(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == word + "\n"


def test_a_run_that_another_process_is_at_is_not_resumed(tmp_path):
    with at_work(tmp_path / "out") as other:
        before = (tmp_path / "out" / "run.json").read_bytes()
        with pytest.raises(InputError, match=rf"is written to by another process \({other.pid} on .*\); wait until"):
            RunFolder(tmp_path / "out").begin("search", {"steps": 10}, resume=True, where={"device": "another"})
        assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_a_finished_run_that_another_process_resumes_is_not_resumed_beside_it(tmp_path):
    run = RunFolder(tmp_path)
    run.begin("search", {"steps": 10})
    run.finish()
    with at_work(tmp_path) as other:
        with pytest.raises(InputError, match=rf"is written to by another process \({other.pid} on"):
            RunFolder(tmp_path).begin("search", {"steps": 10}, resume=True)
        tell(other, "finish")
        assert RunFolder(tmp_path).begin("search", {"steps": 10}, resume=True)


def test_what_another_process_finished_meanwhile_stays_finished(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.begin("search", {})
    unfinished = run.read()
    run.finish()
    read, answers = run.read, [unfinished]  # as it was when this process looked
    monkeypatch.setattr(run, "read", lambda: answers.pop() if answers else read())
    assert run.begin("search", {}, resume=True, where={"device": "another"})
    assert run.read()["finished"] and run.read()["where"] == {"device": "another"}


def test_events_that_a_run_writes_are_left_to_it(tmp_path, monkeypatch):
    """The file that it writes on to would be gone, and what comes after with it."""
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = MagicMock()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = make_search(tmp_path / "search", finished=False, count=2)
    file = folder / "tensorboard" / "search" / "events.out.tfevents.1.host"
    with at_work(folder / "tensorboard") as other:
        file.parent.mkdir()
        file.touch()
        with pytest.raises(InputError, match=rf"the folder of events .* by another process \({other.pid} on .*; wait"):
            Report(folder, tensorboard=True)()
        assert file.is_file() and not (folder / "report.html").exists()
    Report(folder, tensorboard=True)()
    assert not file.exists() and (folder / "report.html").is_file()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed_leaves_no_lock(tmp_path, sent):
    with at_work(tmp_path) as other:
        other.send_signal(sent)
        other.wait()
        assert RunFolder(tmp_path).begin("search", {"steps": 10}, resume=True)


@pytest.mark.parametrize("word", ["finish", "close"])
def test_a_run_that_is_finished_or_closed_lets_others_in(tmp_path, word):
    with at_work(tmp_path) as other:
        tell(other, word)
        assert RunFolder(tmp_path).begin("search", {"steps": 10}, resume=True)


def test_who_begins_second_in_an_empty_folder_is_refused(tmp_path, monkeypatch):
    with at_work(tmp_path):
        monkeypatch.setattr(RunFolder, "read", lambda run: None)  # as it was when this process looked
        monkeypatch.setattr(RunFolder, "_require_empty", lambda run: None)
        before = (tmp_path / "run.json").read_bytes()
        with pytest.raises(InputError, match="is written to by another process"):
            RunFolder(tmp_path).begin("train", {})
        assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("moment", ["it looked", "it waited for the lock"])
def test_a_run_that_began_and_ended_meanwhile_is_not_overwritten(tmp_path, monkeypatch, moment):
    run = RunFolder(tmp_path)
    owner, name = (run, "read") if moment == "it looked" else (run_folder, "lock_folder")
    own = getattr(owner, name)

    def meanwhile(*given):
        found = own(*given)
        run.file.write_text("of another")
        return found

    monkeypatch.setattr(owner, name, meanwhile)
    with pytest.raises(InputError, match=r"was taken for another run just now"):
        run.begin("train", {})
    assert run.file.read_text() == "of another"


def test_a_process_may_resume_its_own_run(tmp_path):
    RunFolder(tmp_path).begin("search", {})
    assert RunFolder(tmp_path).begin("search", {}, resume=True)


def test_a_child_does_not_keep_the_lock_of_a_process_that_is_gone(tmp_path):
    lock_folder(tmp_path, "out")
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        unlock_folder(tmp_path)
        with at_work(tmp_path) as other:
            assert other.poll() is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_was_withdrawn_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path / "out")
    run.begin("train", {})
    assert (run.path / LOCK).exists()
    run.withdraw()
    assert not run.path.exists()
    assert run.begin("train", {}) is False and RunFolder(run.path).begin("train", {}, resume=True)
