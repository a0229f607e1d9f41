"""What can be told of a Ray cluster where Ray is not installed."""

import sys

import pytest
import torch

from jdkd.errors import InputError
from jdkd.execution import executor
from jdkd.execution.cluster import _task_here
from jdkd.notices import say_once, told_to
from tests.execution.fake_task import FakeTask


def test_a_package_that_is_missing_is_named(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is 'auto', and the package ray is not installed.*jdkd\[ray\]"):
        executor(task, "cpu", ray="auto")


class Talking(FakeTask):
    """Says something of its base when it is opened."""

    def open(self, device, progress):
        say_once(f"the base in {self.inputs['base']} says nothing of its training images")
        return super().open(device, progress)


def test_what_a_worker_says_of_its_own_copies_is_not_passed_on(task, jobs_of, monkeypatch):
    told, threads = [], torch.get_num_threads()
    monkeypatch.setattr("jdkd.execution.cluster.Reports", lambda send, pause: lambda *state: None)
    try:
        with told_to(lambda *notice: told.append(notice)):
            here = _task_here("a token", Talking(**vars(task)), {"base": {"content.txt": b"of the base"}}, "cpu", None)
            assert told == [], "the driver has said it, of a folder that the user knows"
            (job,) = jobs_of(None)
            assert here.evaluate(job)["inputs"] == {"base": "of the base"}
        assert [key for _, key in told] == ["no box"], "what comes of a job is"
    finally:
        torch.set_num_threads(threads)
        here.scratch.cleanup()
