"""Several processes of one group, forked from one that has loaded torch and done nothing else.

To load it anew takes each of them seconds; and a test's own process, whose autograd has run, cannot be forked.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "jdkd.nn", "jdkd.train", "jdkd.distill", "jdkd.detect"])


def started(work: Callable, *arguments: object, count: int = 2, seconds: float = 300.0) -> None:
    """Runs ``work(rank, *arguments)`` in each of ``count`` processes, and waits for all of them."""
    how = {"nprocs": count, "join": False, "daemon": True, "start_method": FORKS.get_start_method()}
    context = torch.multiprocessing.start_processes(_alone, (work, *arguments), **how)
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


def _alone(rank: int, work: Callable, *arguments: object) -> None:
    torch.set_num_threads(1)
    work(rank, *arguments)


def _joined(rank: int, work: Callable, folder: str, *arguments: object) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
