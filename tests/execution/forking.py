"""Workers that are forked, where that is possible: to load torch anew takes each of them seconds."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from jdkd.execution import processes

FORKED = pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")  # Python 3.12 on


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """Forks the workers of :class:`jdkd.execution.Processes`, which are spawned as CUDA does not outlive a fork."""
    if not torch.cuda.is_available():
        forking = SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
        patch.setattr(processes, "multiprocessing", forking)
