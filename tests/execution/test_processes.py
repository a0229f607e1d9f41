"""Jobs in several processes: what they come to, and what becomes of them when a process dies."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from jdkd.errors import InputError
from jdkd.execution import InProcess, Processes, executor
from jdkd.execution.choosing import devices_for
from jdkd.notices import Notice
from tests.execution.fake_task import FakeTask

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:an image holds no box:jdkd.notices.Notice")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition, seconds=20.0) -> bool:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(holds)


def pids(marks, kind="opened") -> set[int]:
    return {int(file.name.split("-")[-1]) for file in marks.glob(f"{kind}-*")}


@pytest.fixture
def task(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "marks").mkdir()
    return FakeTask(tmp_path / "out", tmp_path / "marks")


def jobs_of(*fates):
    return [{"number": number, "fate": fate} for number, fate in enumerate(fates, 1)]


@pytest.fixture
def two(task):
    """Two workers, and what they told."""
    told = []
    with closing(executor(task, "cpu", workers=2, progress=lambda *state: told.append(state))) as two:
        two.told = told
        yield two


def outcomes(done) -> dict:
    return {job["number"]: outcome for job, outcome in done}


def test_the_worker_changes_nothing_about_an_outcome(task, two):
    jobs = jobs_of("sleeps", "well", "well", "sleeps")
    there = outcomes(two.run(jobs))
    here = outcomes(executor(task, "cpu").run(jobs))
    assert len({outcome["pid"] for outcome in there.values()}) == 2, "both worked"
    assert {outcome.pop("pid") for outcome in here.values()} == {os.getpid()}
    threads = {outcome.pop("threads") for outcome in there.values()}
    assert threads == {max(1, torch.get_num_threads() // 2)}
    assert {outcome.pop("threads") for outcome in here.values()} == {torch.get_num_threads()}
    assert {number: {**outcome, "pid": 0} for number, outcome in there.items()} == {
        number: {**outcome, "pid": 0} for number, outcome in here.items()
    }
    assert len({outcome["drawn"] for outcome in here.values()}) == 4, "jobs draw apart"
    assert here[1]["pair"] == [1, 2], "JSON"


def test_a_job_leaves_the_callers_generator_alone(task):
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    list(InProcess(task, "cpu", lambda *state: None).run(jobs_of("well")))
    assert torch.rand(()) == expected


def test_a_worker_opens_its_task_once_and_serves_generation_after_generation(task, two):
    for _ in range(3):
        assert len(outcomes(two.run(jobs_of("well", "well", "well")))) == 3
    assert len(pids(task.marks)) == 2


def test_progress_and_notices_come_back(two):
    with pytest.warns(Notice, match="no box") as said:
        list(two.run(jobs_of("well", "well", "well")))
    assert len(said) == 1, "two processes say it, the user reads it once"
    for number in (1, 2, 3):
        assert (f"candidate {number}", 0, 2, {"loss": 1.0}) in two.told
        assert (f"candidate {number}", 2, 2, {"loss": 0.5}) in two.told


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(task, two):
    with pytest.warns(Notice) as said:
        done = outcomes(two.run(jobs_of("is killed once", "crashes once", "well", "well")))
    assert done.keys() == {1, 2, 3, 4} and not any("failure" in outcome for outcome in done.values())
    words = sorted(str(notice.message) for notice in said if "worker process" in str(notice.message))
    assert len(words) == 2 and "SIGKILL" in words[0] and "candidate 1" in words[0] and "SIGSEGV" in words[1]
    assert len(list(task.marks.glob("begun-1-*"))) == 2, "in another process"


def test_a_job_that_kills_three_workers_is_a_failure_and_the_others_go_on(task, two):
    with pytest.warns(Notice, match="for the second time"):
        done = outcomes(two.run(jobs_of("is always killed", "well", "well")))
    assert "SIGKILL" in done[1]["failure"] and "3 times" in done[1]["failure"]
    assert len(list(task.marks.glob("begun-1-*"))) == 3
    assert "failure" not in done[2] and "failure" not in done[3]


def test_a_worker_killed_while_it_waits_costs_no_job(two):
    killed = outcomes(two.run(jobs_of("well")))[1]["pid"]
    os.kill(killed, signal.SIGKILL)
    assert soon(lambda: not alive(killed))
    with pytest.warns(None) if False else pytest.warns(Notice, match="no box"):
        from jdkd import notices

        notices._said.clear()
        done = outcomes(two.run(jobs_of("well", "well")))
    assert len(done) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_that_diverges_is_a_failure_and_the_others_go_on(task, workers):
    with closing(executor(task, "cpu", workers=workers)) as some:
        done = outcomes(some.run(jobs_of("diverges", "well")))
    assert done[1] == {"failure": "training diverged at step 1 of 1."} and done[2]["number"] == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fate", "kind", "says"),
    [
        ("is refused", InputError, r"^an image cannot be read\.$"),
        ("is a bug", KeyError, "no such thing"),
        ("cannot be pickled", Exception, "1 and 2"),
        ("fills the disk", OSError, "No space left on device: 'out/candidates/001/weights.safetensors'"),
        ("fills the memory", InputError, "memory of cpu is full during candidate 1 .*fewer workers"),
    ],
)
def test_what_the_user_or_we_have_to_mend_ends_the_search(task, workers, fate, kind, says):
    with closing(executor(task, "cpu", workers=workers)) as some:
        with pytest.raises(kind, match=says) as raised:
            list(some.run(jobs_of(fate)))
    if workers:
        assert "in fate" in "".join(raised.value.__notes__), "the worker's traceback is told"
    assert soon(lambda: not any(map(alive, pids(task.marks) - {os.getpid()})))


@pytest.mark.parametrize(
    ("opening", "says"),
    [
        ("refused", r"the base in .* cannot be read\."),
        ("killed", "killed by SIGKILL, .* before it had loaded base and data"),
        ("ended", "ended with exit code 3 before it had loaded base and data"),
    ],
)
def test_a_task_that_cannot_be_opened_ends_the_search(tmp_path, task, opening, says):
    broken = FakeTask(task.out, task.marks, opening=opening)
    with pytest.warns(Notice) if opening == "killed" else closing(task.marks.open) if False else _quiet():
        with closing(executor(broken, "cpu", workers=2)) as two, pytest.raises(InputError, match=says):
            list(two.run(jobs_of("well", "well")))


class _quiet:
    def __enter__(self): ...
    def __exit__(self, *given): ...


def test_an_executor_that_is_closed_at_work_interrupts_it_and_leaves_no_process(task, two):
    running = two.run(jobs_of("waits", "well"))
    assert next(running)[0]["number"] == 2
    assert soon(lambda: (task.marks / "first-1").exists())
    two.close()
    assert (task.marks / "saved").exists(), "as fit saves its step"
    assert not any(map(alive, pids(task.marks)))


SCRIPT = """
import sys
from pathlib import Path
from tests.execution.fake_task import FakeTask
from jdkd.execution import executor

if __name__ == "__main__":
    two = executor(FakeTask(Path(sys.argv[1]), Path(sys.argv[2])), "cpu", workers=2)
    try:
        list(two.run([{"number": number, "fate": "waits"} for number in (1, 2)]))
    finally:
        two.close()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_driver(task, tmp_path, sent):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(task.out), str(task.marks)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=alone, start_new_session=True, stderr=subprocess.PIPE) as driver:
        assert soon(lambda: len(pids(task.marks, "begun")) == 2, 60)
        os.killpg(driver.pid, sent)
        driver.wait(30)
        assert soon(lambda: not any(map(alive, pids(task.marks))), 5)
        assert b"jdkd/execution/worker.py" not in driver.stderr.read(), "no traceback of a worker"
    assert (task.marks / "saved").exists() is (sent == signal.SIGINT)


def test_ctrl_c_at_any_time_ends_everything(task, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(task.out), str(task.marks)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=alone, start_new_session=True, stderr=subprocess.PIPE) as driver:
        assert soon(lambda: len(pids(task.marks)) >= 1, 60)
        os.killpg(driver.pid, signal.SIGINT)
        driver.wait(30)
        assert soon(lambda: not any(map(alive, pids(task.marks))), 5)


def test_gpus_are_shared_out_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for(3, "cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_for(3, "cuda:1") == ["cuda:1"] * 3
    assert devices_for(2, "cpu") == ["cpu"] * 2


def test_workers_that_cannot_be_are_refused(task):
    with pytest.raises(InputError, match="workers is -1"):
        executor(task, "cpu", workers=-1)
    with pytest.raises(InputError, match="workers is 2 and ray 'auto'"):
        executor(task, "cpu", workers=2, ray="auto")
    assert isinstance(executor(task, "cpu", workers=1), InProcess)
    with closing(executor(task, "cpu", workers=2)) as two:
        assert isinstance(two, Processes)
