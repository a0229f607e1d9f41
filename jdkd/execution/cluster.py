"""A Ray cluster: see :class:`RayTasks`."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jdkd.errors import InputError, said
from jdkd.execution.task import Evaluate, Json, Task, named, outcome_of
from jdkd.execution.worker import Reports, portable
from jdkd.files import write_whole
from jdkd.notices import ProgressCallback, say_once, told_to

RETRIES = 2  # of a job whose worker was lost; Ray's own
PAUSE = 1.0  # seconds between two reports of one thing, which cross a network
GLANCE = 0.5  # seconds between two looks at what was reported
Files = dict[str, bytes]  # by their path in a folder


class RayTasks:
    """The jobs as tasks of a Ray cluster, which places them, and places them again where a worker is lost.

    Workers need this package and the images under the same path; base, pool, parents and candidates travel through
    Ray's object store, and only this process writes to ``task.out``. A job takes one CPU, with one thread, and on GPUs
    one of those. A worker opens the task once on a CPU; on a GPU Ray starts a process for every job.

    Args:
        task: what is opened in every worker.
        address: as ``ray.init`` takes it: ``"auto"`` for the cluster that this machine belongs to.
        device: ``"cpu"``, or anything with ``cuda`` for a GPU each.
        progress: called in this process with what workers report, while :meth:`run` is waited for.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, task: Task, address: str, device: str, progress: ProgressCallback) -> None:
        self.task, self.progress = task, progress
        self._ray, self._is_ours = _connected(address)
        self._device = torch.device(device).type
        gpus = int(self._device == "cuda")
        if gpus and not self._ray.cluster_resources().get("GPU"):
            say_once(f"the Ray cluster at {address} has no GPU now; jobs on {device} wait until one joins it")
        remote = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        self._answer = remote(_answer)
        self._board = _board()
        self._pending: dict[Any, Json] = {}
        self._token = uuid.uuid4().hex
        self._shared: list[Any] = []

    def run(self, jobs: Sequence[Json]) -> Iterator[tuple[Json, Json]]:
        """As :meth:`Executor.run`."""
        ray, task = self._ray, self.task
        if jobs and not self._shared:
            inputs = {name: _files_in(folder) for name, folder in task.inputs.items()}
            self._shared = [ray.put((task, inputs))]
        names = dict.fromkeys(name for job in jobs for name in task.reads(job))
        stored = {name: ray.put(_files_in(task.out / name)) for name in names}
        try:
            for job in jobs:
                read = {name: stored[name] for name in task.reads(job)}
                reference = self._answer.remote(self._token, self._shared, job, read, self._device, self._board)
                self._pending[reference] = job
            while self._pending:
                done, _ = ray.wait([*self._pending], timeout=GLANCE)
                self._tell()
                for reference in done:
                    job = self._pending.pop(reference)
                    yield job, self._outcome(job, reference)
            self._tell()
        finally:  # where it was not the last of them that ended this
            self._cancel()

    def close(self) -> None:
        """As :meth:`Executor.close`; what a cancelled job had trained stays on its machine and is lost."""
        self._cancel()
        if self._is_ours:
            self._is_ours = False
            self._ray.shutdown()

    def _cancel(self) -> None:
        for reference in self._pending:
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(reference)
        self._pending = {}

    def _outcome(self, job: Json, reference: Any) -> Json:
        """What a finished task came to, once its files are written."""
        lost = self._ray.exceptions
        try:
            kind, answer, files = self._ray.get(reference)
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError) as error:
            return {"failure": f"its Ray worker was lost {1 + RETRIES} times in succession ({said(error)})."}
        except lost.RayError as error:
            raise InputError(
                f"the Ray cluster could not do {named(job)} ({said(error)}): see that it runs and that every node has "
                "this jdkd and the images under the same path, then resume."
            ) from error
        if kind == "error":
            raise answer
        for name, held in files.items():
            _write(held, self.task.out / name)
        return answer

    def _tell(self) -> None:
        """Passes on what workers reported since the last time."""
        reports: list[tuple[Any, ...]] = []
        with suppress(self._ray.exceptions.RayError):  # reports are not worth a search
            reports = self._ray.get(self._board.taken.remote())
        for kind, *report in reports:
            (self.progress if kind == "progress" else say_once)(*report)


def _connected(address: str) -> tuple[Any, bool]:
    """The module ray, connected, and whether that was done now; a connection that this process has is used."""
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError(
            f"ray is {address!r}, and the package ray is not installed; install it with: pip install 'jdkd[ray]'"
        ) from None
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster is found at ray {address!r} ({said(error)}); start one with `ray start --head`, or give "
            "the address of one."
        ) from error
    return ray, True


def _board() -> Any:
    """An actor that holds reports until they are taken."""
    import ray

    @ray.remote(num_cpus=0)
    class Board:
        def __init__(self) -> None:
            self.reports: list[tuple[Any, ...]] = []

        def put(self, *report: Any) -> None:
            self.reports.append(report)

        def taken(self) -> list[tuple[Any, ...]]:
            taken, self.reports = self.reports, []
            return taken

    return Board.remote()


@dataclass
class _Opened:
    """The task in a worker process."""

    token: str
    evaluate: Evaluate
    task: Task
    scratch: tempfile.TemporaryDirectory


_opened: list[_Opened] = []  # in a worker process: the task that it has open, if it has one


def _answer(
    token: str, shared: list[Any], job: Json, read: Mapping[str, Any], device: str, board: Any
) -> tuple[str, Any, Any]:
    """In a worker process: does a job.

    Args:
        token: names the executor.
        shared: a reference to its task and the files of the inputs, fetched only where the task is not open yet.
        job: what to do.
        read: references to the files of the folders that it reads, by their names.
        device: ``"cpu"`` or ``"cuda"``.
        board: where reports go.

    Returns:
        ``("outcome", outcome, files by folder)`` or ``("error", error, None)``.
    """
    import ray

    with told_to(lambda *notice: board.put.remote("notice", *notice)):
        try:
            if not _opened or _opened[0].token != token:
                _opened[:] = [_task_here(token, *ray.get(shared[0]), device, board)]
            (here,) = _opened
            for name, reference in read.items():
                _write(ray.get(reference), here.task.out / name)
            outcome = outcome_of(here.evaluate, job, device)
            return "outcome", outcome, {name: _files_in(here.task.out / name) for name in here.task.writes(job)}
        except Exception as error:
            return "error", portable(error), None
        finally:
            for here in _opened:
                for entry in here.task.out.iterdir():
                    shutil.rmtree(entry, ignore_errors=True)


def _task_here(token: str, task: Task, inputs: dict[str, Files], device: str, board: Any) -> _Opened:
    """The task, open; its inputs and its ``out`` lie in a scratch folder of this process."""
    scratch = tempfile.TemporaryDirectory(prefix="jdkd-")
    root = Path(scratch.name)
    for name, held in inputs.items():
        _write(held, root / "inputs" / name)
    (root / "out").mkdir()
    task = task.elsewhere(root / "out", {name: root / "inputs" / name for name in inputs})
    torch.set_num_threads(1)
    with told_to(lambda *notice: None):  # the driver has opened it too, and said it of folders that the user knows
        evaluate = task.open(device, Reports(lambda *state: board.put.remote("progress", *state), PAUSE))
    return _Opened(token, evaluate, task, scratch)


def _files_in(folder: Path) -> Files:
    """What a folder holds, all the way down."""
    try:
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); make it readable, then resume."
        ) from None


def _write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, content)
