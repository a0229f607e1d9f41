"""What takes long and is made once for all processes of a run of the tests."""

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same one for all its processes."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], T]) -> T:
    """What ``make(folder)`` returned in the first process that asked; it fills the folder, which tests leave alone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = folder.with_suffix(".pickle")
        if not answer.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            answer.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(answer.read_bytes())
