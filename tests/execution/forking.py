"""Workers that are forked, where that is possible: to load torch anew takes each of them seconds."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from jdkd.execution import processes

FORKED = pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")  # Python 3.12 on


METHOD = "spawn" if torch.cuda.is_available() else "fork"  # CUDA does not outlive a fork


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """Forks the workers of :class:`jdkd.execution.Processes`, spawned for a user; they must not need autograd."""
    forking = SimpleNamespace(get_context=lambda method: multiprocessing.get_context(METHOD))
    patch.setattr(processes, "multiprocessing", forking)
