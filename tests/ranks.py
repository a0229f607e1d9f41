"""Several processes of one group, forked where that is possible: to load torch anew takes each of them seconds."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

METHOD = "spawn" if torch.cuda.is_available() else "fork"  # neither CUDA nor an autograd that knows it outlives a fork


def started(work: Callable, *arguments: object, count: int = 2, seconds: float = 300.0) -> None:
    """Runs ``work(rank, *arguments)`` in each of ``count`` processes, and waits for all of them."""
    how = {"nprocs": count, "join": False, "daemon": True, "start_method": METHOD}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 on: what forks has several threads
        context = torch.multiprocessing.start_processes(_fresh, (work, *arguments), **how)
    ends = time.monotonic() + seconds
    while not context.join(1.0):  # whoever fails ends all, and raises here
        if time.monotonic() > ends:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} takes more than {seconds} seconds")


def found_by_ranks(work: Callable, *arguments: object) -> list:
    """What ``work(rank, *arguments)`` returns in each of two processes that form a group over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        started(_joined, work, folder, *arguments)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


def _fresh(rank: int, work: Callable, *arguments: object) -> None:
    """Without what a test has set in the process that was forked."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        work(rank, *arguments)


def _joined(rank: int, work: Callable, folder: str, *arguments: object) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
