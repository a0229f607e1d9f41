"""Jobs in several processes: what they come to, and what becomes of them when a process dies."""

import multiprocessing
import os
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jdkd.errors import InputError
from jdkd.execution import InProcess, Processes, executor, processes
from jdkd.execution.choosing import devices_for
from jdkd.execution.worker import Reports
from jdkd.notices import Notice
from tests.execution.fake_task import FakeTask
from tests.execution.forking import FORKED, METHOD, fork_workers
from tests.execution.processes import alive, pids, soon

pytestmark = [pytest.mark.filterwarnings("ignore:candidate .* holds no box:jdkd.notices.Notice"), FORKED]


@pytest.fixture(scope="module", autouse=True)
def forked():
    """Workers are forked here, but for those of one driver below."""
    with pytest.MonkeyPatch.context() as patch:
        fork_workers(patch)
        yield


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def two(task, told):
    """Two workers for all tests of this module."""
    with closing(executor(task, "cpu", workers=2, progress=lambda *state: told.append(state))) as two:
        yield two


@pytest.fixture
def here(task):
    return executor(task, "cpu")


def outcomes(executor, jobs) -> list[dict]:
    """In the order of the jobs."""
    done = {job["number"]: outcome for job, outcome in executor.run(jobs)}
    return [done[job["number"]] for job in jobs]


def test_the_worker_changes_nothing_about_an_outcome(task, two, here, jobs_of):
    jobs = jobs_of("waits for another", None, None, None)
    running = two.run(jobs)
    done = [next(running) for _ in range(3)]
    (task.marks / "go").touch()
    done += running
    assert [job["number"] for job, _ in done] == [job["number"] for job in (*jobs[1:], jobs[0])], "as they finish"
    there = [outcome for _, outcome in sorted(done, key=lambda pair: pair[0]["number"])]
    alone = outcomes(here, jobs)
    assert len({outcome.pop("pid") for outcome in there}) == 2, "both worked"
    assert {outcome.pop("pid") for outcome in alone} == {os.getpid()}
    assert {outcome.pop("threads") for outcome in there} == {max(1, torch.get_num_threads() // 2)}
    assert {outcome.pop("threads") for outcome in alone} == {torch.get_num_threads()}
    assert there == alone
    assert len({outcome["drawn"] for outcome in alone}) == 4, "jobs draw apart"
    assert alone[0]["pair"] == [1, 2], "JSON, as from another process"


def test_a_job_leaves_the_generator_of_its_process_alone(here, jobs_of):
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    outcomes(here, jobs_of(None))
    assert torch.rand(()) == expected


def test_workers_open_their_task_once_and_serve_generation_after_generation(task, two, jobs_of):
    outcomes(two, jobs_of(None, None))
    before = pids(task.marks)
    for _ in range(3):
        outcomes(two, jobs_of(None, None, None))
    assert pids(task.marks) == before


def test_progress_and_notices_come_back(two, told, jobs_of):
    jobs = jobs_of(None, None, None, key="something new")
    with pytest.warns(Notice, match="no box") as said:
        assert len({outcome["pid"] for outcome in outcomes(two, jobs)}) == 2
    assert len(said) == 1, "two processes say it, the user reads it once"
    for job in jobs:
        assert (f"candidate {job['number']}", 0, 2, {"loss": 1.0}) in told
        assert (f"candidate {job['number']}", 2, 2, {"loss": 0.5}) in told


def test_reports_are_passed_on_now_and_then_and_the_last_one_always():
    passed = []
    reports = Reports(lambda *state: passed.append(state[:2]), pause=60.0)
    for step in range(1, 6):
        reports("one", step, 5)
    reports("two", 1, 5)
    assert passed == [("one", 1), ("one", 5), ("two", 1)]


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(task, two, jobs_of):
    jobs = jobs_of("is killed once", "crashes once", None, None)
    with pytest.warns(Notice) as said:
        assert not any("failure" in outcome for outcome in outcomes(two, jobs))
    words = sorted(str(notice.message) for notice in said if "lost its worker" in str(notice.message))
    assert len(words) == 2 and "SIGKILL" in words[0] and "SIGSEGV" in words[1]
    assert words[0].startswith(f"candidate {jobs[0]['number']} lost")
    assert len(pids(task.marks, f"begun-{jobs[0]['number']}")) == 2, "in another process"


def test_a_job_that_kills_again_and_again_is_a_failure_and_the_others_go_on(task, two, jobs_of):
    jobs = jobs_of("is always killed", None, None)
    with pytest.warns(Notice) as said:
        failed, *others = outcomes(two, jobs)
    words = [str(notice.message) for notice in said if "lost its worker" in str(notice.message)]
    assert [sentence[-22:] for sentence in words] == [f"carries it on ({again} of 2)" for again in (1, 2)]
    assert "SIGKILL" in failed["failure"] and "3 times" in failed["failure"]
    assert len(pids(task.marks, f"begun-{jobs[0]['number']}")) == 3
    assert not any("failure" in outcome for outcome in others)


def test_a_worker_killed_while_it_waits_costs_no_job(two, jobs_of):
    killed = {outcome["pid"] for outcome in outcomes(two, jobs_of(None))}.pop()
    os.kill(killed, signal.SIGKILL)
    assert soon(lambda: killed not in {child.pid for child in multiprocessing.active_children()})
    assert killed not in {outcome["pid"] for outcome in outcomes(two, jobs_of(None, None))}


@pytest.mark.parametrize("place", ["here", "two"])
def test_a_model_that_diverges_is_a_failure_and_the_others_go_on(request, place, jobs_of):
    failed, other = outcomes(request.getfixturevalue(place), jobs_of("diverges", None))
    assert failed == {"failure": "training diverged."} and "failure" not in other


@pytest.mark.parametrize("place", ["here", "two"])
@pytest.mark.parametrize(
    ("fate", "kind", "says"),
    [
        ("is refused", InputError, "an image cannot be read."),
        ("is a bug", KeyError, "'no such thing'"),
        ("fills the disk", OSError, "No space left on device: 'out/candidates/001/weights.safetensors'"),
        ("fills the memory", InputError, "resume with fewer workers"),
        ("cannot be pickled", Exception, "1 and 2"),
    ],
)
def test_what_somebody_has_to_mend_ends_the_search(request, place, fate, kind, says, jobs_of):
    with pytest.raises(kind) as raised:
        outcomes(request.getfixturevalue(place), jobs_of(fate))
    assert says in str(raised.value)
    if place == "two":
        assert "in befall" in "".join(raised.value.__notes__), "the worker's traceback is told"


@pytest.mark.parametrize(
    ("opening", "says"),
    [
        ("refused", r"the base cannot be read\."),
        ("killed", "killed by SIGKILL .* before it had loaded base and data"),
        ("ended", "ended with exit code 3 before it had loaded base and data"),
    ],
)
def test_a_task_that_cannot_be_opened_ends_the_search(task, opening, says, jobs_of, monkeypatch):
    monkeypatch.setattr(processes, "RETRIES", 0)
    with closing(executor(replace(task, opening=opening), "cpu", workers=2)) as broken:
        with pytest.raises(InputError, match=says):
            outcomes(broken, jobs_of(None))


def test_whoever_is_at_work_when_another_fails_saves_and_the_executor_can_be_used_on(task, two, jobs_of):
    jobs = jobs_of("waits", None, "is refused")
    running = two.run(jobs)
    assert next(running)[0] == jobs[1]
    assert soon(lambda: pids(task.marks, "waiting"))
    with pytest.raises(InputError):
        next(running)
    (busy,) = pids(task.marks, "waiting")
    assert busy in pids(task.marks, "saved") and not alive(busy)
    assert len(outcomes(two, jobs_of(None, None))) == 2


def drive(folder: Path, spawned: bool) -> None:
    """A process of its own, with two workers that wait."""
    os.setsid()
    with (folder / "said").open("w") as said:
        os.dup2(said.fileno(), 2)
    sys.stderr, sys.stdout = sys.__stderr__, sys.__stdout__
    if spawned:  # as a user's are
        processes.multiprocessing = multiprocessing
    with closing(executor(FakeTask(folder, folder), "cpu", workers=2)) as two:
        list(two.run([{"number": number, "fate": "waits"} for number in (1, 2)]))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_driver(tmp_path, sent):
    driver = multiprocessing.get_context(METHOD).Process(target=drive, args=(tmp_path, sent == signal.SIGKILL))
    driver.start()
    assert soon(lambda: len(pids(tmp_path, "waiting")) == 2, 120)
    os.killpg(driver.pid, sent)  # as a terminal does
    workers = pids(tmp_path, "waiting")
    assert soon(lambda: not any(map(alive, workers)))
    driver.join()
    assert "worker.py" not in (tmp_path / "said").read_text(), "workers say nothing"
    assert pids(tmp_path, "saved") == (workers if sent == signal.SIGINT else set()), "as fit does"


def test_gpus_are_shared_out_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for(3, "cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_for(3, "cuda:1") == ["cuda:1"] * 3
    assert devices_for(2, "cpu") == ["cpu"] * 2


def test_workers_that_cannot_be_are_refused(task):
    with pytest.raises(InputError, match="workers is -1"):
        executor(task, "cpu", workers=-1)
    for workers in (1.5, None):
        with pytest.raises(InputError, match=f"workers is {workers}; give 0 to work in one"):
            executor(task, "cpu", workers=workers)
    with pytest.raises(InputError, match="workers is 2 and ray 'auto'"):
        executor(task, "cpu", workers=2, ray="auto")
    assert isinstance(executor(task, "cpu", workers=1), InProcess)
    with closing(executor(task, "cpu", workers=2)) as two:
        assert isinstance(two, Processes)


def test_what_this_process_has_open_is_not_opened_again(task, jobs_of):
    before = pids(task.marks)
    ready = executor(task, "cpu", evaluate=lambda job: {"answer": 1})
    assert outcomes(ready, jobs_of(None)) == [{"answer": 1}] and pids(task.marks) == before


@pytest.mark.gpu
def test_workers_share_a_gpu_and_draw_alike(task, jobs_of):
    jobs = jobs_of(None, None)
    with closing(executor(task, "cuda", workers=2)) as two:
        there = outcomes(two, jobs)
    assert {outcome["device"] for outcome in there} <= {f"cuda:{i}" for i in range(torch.cuda.device_count())}
    assert [outcome["drawn"] for outcome in there] == [
        outcome["drawn"] for outcome in outcomes(executor(task, "cuda"), jobs)
    ]
