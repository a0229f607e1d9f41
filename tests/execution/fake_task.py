"""A task without a detector: its jobs say what becomes of them."""

import errno
import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from jdkd.errors import InputError, ModelError
from jdkd.notices import say_once


@dataclass(frozen=True)
class FakeTask:
    """Its jobs leave marks, so that a test sees what was done, by whom and how often."""

    out: Path
    marks: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    opening: str = "well"

    def open(self, device, progress):
        (self.marks / f"opened-{os.getpid()}").touch()
        match self.opening:
            case "refused":
                raise InputError("the base cannot be read.")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "ended":
                os._exit(3)
        held = {name: (folder / "content.txt").read_text() for name, folder in self.inputs.items()}

        def evaluate(job):
            (self.marks / f"begun-{job['number']}-{os.getpid()}").touch()
            progress(f"candidate {job['number']}", 0, 2, {"loss": 1.0})
            say_once(f"candidate {job['number']} holds no box", key=job.get("key", "no box"))
            first = self.marks / f"first-{job['number']}"
            is_first = not first.exists()
            first.touch()
            befall(job.get("fate"), is_first, first)
            progress(f"candidate {job['number']}", 2, 2, {"loss": 0.5})
            read = [(self.out / name / "content.txt").read_text() for name in self.reads(job)]
            for name in self.writes(job):
                (self.out / name / "deep").mkdir(parents=True, exist_ok=True)
                (self.out / name / "deep" / "content.txt").write_text(f"of {job['number']}")
            outcome = {"device": device, "threads": torch.get_num_threads(), "inputs": held, "read": read}
            return outcome | {"drawn": torch.rand((), device=device).item(), "pid": os.getpid(), "pair": (1, 2)}

        return evaluate

    def elsewhere(self, out, inputs):
        return replace(self, out=out, inputs=inputs)

    def reads(self, job):
        return job.get("reads", ())

    def writes(self, job):
        return job.get("writes", ())


def befall(fate, is_first, mark):
    """Does what a job says, some of it only the first time."""
    match fate:
        case "diverges":
            raise ModelError("training diverged.")
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
        case "is killed once" if is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashes once" if is_first:
            faulthandler.disable()  # pytest's, in a worker that was forked: nobody is to read of it
            os.kill(os.getpid(), signal.SIGSEGV)
        case "waits for another":
            while not mark.with_name("go").exists():
                time.sleep(0.01)
        case "waits":
            try:
                mark.with_name(f"waiting-{os.getpid()}").touch()
                time.sleep(60)
            except KeyboardInterrupt:
                mark.with_name(f"saved-{os.getpid()}").touch()
                raise


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
