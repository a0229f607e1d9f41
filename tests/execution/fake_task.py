"""A task without a detector: its jobs say what becomes of them."""

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.train import DivergenceError


@dataclass(frozen=True)
class FakeTask:
    """Its jobs leave marks in ``marks``, so that a test sees what was done, by whom and how often."""

    out: Path
    marks: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    opening: str = "well"

    def open(self, device, progress):
        mark(self.marks, f"opened-{os.getpid()}")
        if self.opening == "refused":
            raise InputError(f"the base in {self.out} cannot be read.")
        if self.opening == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.opening == "ended":
            os._exit(3)
        held = {name: (folder / "content.txt").read_text() for name, folder in self.inputs.items()}

        def evaluate(job):
            mark(self.marks, f"begun-{job['number']}-{os.getpid()}")
            progress(f"candidate {job['number']}", 0, 2, {"loss": 1.0})
            say_once("an image holds no box", key="no box")
            outcome = fate(job.get("fate", "well"), self.marks / f"first-{job['number']}")
            progress(f"candidate {job['number']}", 2, 2, {"loss": 0.5})
            for name in self.reads(job):
                outcome["read"] = (self.out / name / "content.txt").read_text()
            for name in self.writes(job):
                (self.out / name / "deep").mkdir(parents=True, exist_ok=True)
                (self.out / name / "deep" / "content.txt").write_text(f"of {job['number']}")
            about = {"number": job["number"], "device": device, "threads": torch.get_num_threads(), "inputs": held}
            return outcome | about | {"drawn": torch.rand(()).item(), "pid": os.getpid(), "pair": (1, 2)}

        return evaluate

    def elsewhere(self, out, inputs):
        return replace(self, out=out, inputs=inputs)

    def reads(self, job):
        return job.get("reads", ())

    def writes(self, job):
        return job.get("writes", ())


def fate(what, first):
    """Does what a job says, some of it only the first time."""
    fresh = not first.exists()
    first.touch()
    match what:
        case "diverges":
            raise DivergenceError("training diverged at step 1 of 1.", 1, "loss_pkd")
        case "is refused":
            raise InputError("an image cannot be read.")
        case "is a bug":
            raise KeyError("no such thing")
        case "cannot be pickled":
            raise Unpicklable(1, 2)
        case "fills the disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/candidates/001/weights.safetensors")
        case "fills the memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        case "is always killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "is killed once" if fresh:
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashes once" if fresh:
            os.kill(os.getpid(), signal.SIGSEGV)
        case "waits":
            return waited(first)
        case "sleeps":
            time.sleep(0.5)
    return {}


def waited(first):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        first.with_name("saved").touch()
        raise
    return {}


def mark(folder, name):
    (folder / name).touch()


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
