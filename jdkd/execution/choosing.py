"""See :func:`executor`."""

import torch

from jdkd.errors import InputError
from jdkd.execution.cluster import RayTasks
from jdkd.execution.processes import Processes
from jdkd.execution.task import Evaluate, Executor, InProcess, Task
from jdkd.notices import ProgressCallback


def executor(
    task: Task,
    device: str,
    *,
    workers: int = 0,
    ray: str | None = None,
    progress: ProgressCallback | None = None,
    evaluate: Evaluate | None = None,
) -> Executor:
    """The executor that was asked for.

    Args:
        task: what its jobs are jobs of.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; ``"cuda"`` spreads processes over all GPUs.
        workers: processes on this machine; 0 and 1 work in this one.
        ray: ``"auto"`` or the address of a Ray cluster, in place of ``workers``.
        progress: called with (what, done, total, values) as the work goes on, wherever it does.
        evaluate: what ``task.open`` returned, where this process has opened the task.

    Raises:
        InputError: both or a negative number of workers are given, or there is no such cluster.
    """
    if not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers is {workers}; give 0 to work in one process, or the number of processes.")
    if workers and ray is not None:
        raise InputError(
            f"workers is {workers} and ray {ray!r}: a Ray cluster has its own workers; give one of the two."
        )
    progress = progress or (lambda *state: None)
    if ray is not None:
        return RayTasks(task, ray, device, progress)
    if workers < 2:
        return InProcess(task, device, progress, evaluate)
    return Processes(task, devices_for(workers, device), progress)


def devices_for(workers: int, device: str) -> list[str]:
    """The device of every worker: ``"cuda"`` means all GPUs in turn, anything else itself."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{worker % gpus}" if gpus else device for worker in range(workers)]
