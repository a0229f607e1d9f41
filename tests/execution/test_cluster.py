"""Jobs as tasks of a real Ray cluster of two workers on this machine."""

import os
import signal
from contextlib import closing

import pytest

from jdkd.errors import InputError
from jdkd.execution import executor
from jdkd.notices import Notice
from tests.execution.processes import pids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:candidate .* holds no box:jdkd.notices.Notice"),
    pytest.mark.filterwarnings("default::ResourceWarning", "default::DeprecationWarning", "default::FutureWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def two(cluster, task, told):
    with closing(executor(task, "cpu", ray="auto", progress=lambda *state: told.append(state))) as two:
        yield two


def outcomes(executor, jobs) -> list[dict]:
    done = {job["number"]: outcome for job, outcome in executor.run(jobs)}
    return [done[job["number"]] for job in jobs]


def test_a_cluster_changes_nothing_about_an_outcome(task, two, told, jobs_of):
    jobs = jobs_of(None, None, None, key="something new")
    with pytest.warns(Notice, match="no box"):
        there, here = outcomes(two, jobs), outcomes(executor(task, "cpu"), jobs)
    assert os.getpid() not in {outcome.pop("pid") for outcome in there}
    assert {outcome.pop("threads") for outcome in there} == {1}
    assert there == [{k: v for k, v in outcome.items() if k not in ("pid", "threads")} for outcome in here]
    assert there[0]["inputs"] == {"base": "weights of the base"}
    assert all((f"candidate {job['number']}", 2, 2, {"loss": 0.5}) in told for job in jobs)


def test_files_travel_through_the_object_store(task, two, jobs_of):
    (writer,) = jobs_of(None)
    outcomes(two, [writer | {"writes": ["candidates/001"]}])
    file = task.out / "candidates" / "001" / "deep" / "content.txt"
    assert file.read_text() == f"of {writer['number']}"
    (task.out / "parent").mkdir()
    (task.out / "parent" / "content.txt").write_text("weights of a parent")
    readers = jobs_of(None, None, reads=["parent"])
    assert [outcome["read"] for outcome in outcomes(two, readers)] == [["weights of a parent"]] * 2


def test_a_worker_killed_at_work_is_replaced_and_the_run_finishes(task, two, jobs_of):
    jobs = jobs_of("waits for another", "is killed once", None, None)
    running = two.run(jobs)
    done = [next(running)]
    (victim,) = pids(task.marks, f"begun-{jobs[0]['number']}")
    os.kill(victim, signal.SIGKILL)
    (task.marks / "go").touch()
    done += running
    assert {job["number"] for job, _ in done} == {job["number"] for job in jobs}
    assert not any("failure" in outcome for _, outcome in done)
    assert (
        len(pids(task.marks, f"begun-{jobs[0]['number']}")) == 2 == len(pids(task.marks, f"begun-{jobs[1]['number']}"))
    )


def test_a_job_that_kills_again_and_again_is_a_failure_and_the_others_go_on(task, two, jobs_of):
    jobs = jobs_of("is always killed", "diverges", None)
    killed, diverged, well = outcomes(two, jobs)
    assert "lost 3 times" in killed["failure"] and diverged == {"failure": "training diverged."}
    assert len(pids(task.marks, f"begun-{jobs[0]['number']}")) == 3 and "failure" not in well


@pytest.mark.parametrize(("fate", "kind"), [("is refused", InputError), ("is a bug", KeyError)])
def test_what_somebody_has_to_mend_ends_the_search(two, fate, kind, jobs_of):
    with pytest.raises(kind) as raised:
        outcomes(two, jobs_of(fate))
    assert "in befall" in "".join(raised.value.__notes__)


def test_a_cluster_that_is_not_there_is_named(task):
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(InputError, match=r"no Ray cluster is found at ray 'auto'.*ray start --head"):
        executor(task, "cpu", ray="auto")
