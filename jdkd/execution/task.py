"""What an executor is given to do, and the executor that does it at once."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from jdkd.errors import InputError, ModelError, said
from jdkd.notices import ProgressCallback

Json = dict[str, Any]
Evaluate = Callable[[Json], Json]


class Task(Protocol):
    """What all jobs of a search have in common; plain data that can be pickled."""

    @property
    def out(self) -> Path:
        """Folder that jobs read from and write to."""

    @property
    def inputs(self) -> Mapping[str, Path]:
        """The other folders that are read, by a name of the task's own: base, pool."""

    def open(self, device: str, progress: ProgressCallback) -> Evaluate:
        """Loads what is needed, once a process.

        Args:
            device: where to run.
            progress: to be called with (what, done, total, values).

        Returns:
            From a job to its outcome, both JSON. It depends on the job and the task alone; torch's generators are
            seeded with the job before it is called. ModelError makes the job a failure, another error ends the search.
        """

    def elsewhere(self, out: Path, inputs: Mapping[str, Path]) -> "Task":
        """The same task on a machine where its folders lie elsewhere."""

    def reads(self, job: Json) -> Sequence[str]:
        """Folders below ``out`` that a job reads."""

    def writes(self, job: Json) -> Sequence[str]:
        """Folders below ``out`` that a job leaves."""


class Executor(Protocol):
    """Does the jobs of one task."""

    def run(self, jobs: Sequence[Json]) -> Iterator[tuple[Json, Json]]:
        """Yields every job with its outcome as soon as it is there, in any order.

        An outcome is what the task returned, or ``{"failure": sentence}`` for a model that cannot be trained or scored
        and for a job whose process was lost again and again.

        Raises:
            InputError: the task cannot be opened, or a job met what the user has to mend.
            KeyboardInterrupt: after what was under way has saved its step.
        """

    def close(self) -> None:
        """Ends what is under way, saved where it can be, and every process that this executor started."""


class InProcess:
    """The jobs one after the other, in this process.

    Args:
        task: what they are jobs of; opened at the first.
        device: where to run.
        progress: called with (what, done, total, values).
        evaluate: what ``task.open`` returned, where that has been called.
    """

    def __init__(self, task: Task, device: str, progress: ProgressCallback, evaluate: Evaluate | None = None) -> None:
        self.task, self.device, self.progress = task, device, progress
        self._evaluate = evaluate

    def run(self, jobs: Sequence[Json]) -> Iterator[tuple[Json, Json]]:
        self._evaluate = self._evaluate or self.task.open(self.device, self.progress)
        for job in jobs:
            yield job, outcome_of(self._evaluate, job, self.device)

    def close(self) -> None:
        self._evaluate = None


def outcome_of(evaluate: Evaluate, job: Json, device: str) -> Json:
    """What one job comes to, the same wherever it is done: JSON goes in and comes out, and draws start from the job."""
    text = json.dumps(job, sort_keys=True)
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng([torch.device(device)] if on_gpu else []):
        torch.manual_seed(int(fingerprint(job)[:14], 16))
        try:
            return json.loads(json.dumps(evaluate(json.loads(text))))
        except ModelError as error:
            return {"failure": str(error)}
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the memory of {device} is full during {named(job)} ({said(error)}); resume with fewer workers, or "
                "search into another folder with a smaller batch_size."
            ) from error


def fingerprint(job: Json) -> str:
    """SHA-256 of a job, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def named(job: Json) -> str:
    """A job in words."""
    return f"candidate {job['number']}" if "number" in job else f"job {fingerprint(job)[:8]}"
