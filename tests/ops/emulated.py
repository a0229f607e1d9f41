"""The CUDA operators on the host: their own sources, every thread emulated between guard pages; see ``emulation/``."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.machine_code import nvidia_package

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
# Null pointers fault by themselves, and the checks of calls into the C library cost the most to compile.
SANITIZER = "-fsanitize=undefined -fno-sanitize=null,vptr,nonnull-attribute,returns-nonnull-attribute"
FLAGS = f"-Og -std=c++17 -shared -fPIC -w -fno-gnu-unique -Wl,-Bsymbolic {SANITIZER} -fsanitize-undefined-trap-on-error"
MEMORY = {"torch": 0, "begin": 1, "end": 2}


class Emulation:
    """The operators of a library, and the memory, the chip and the order of threads that they run with.

    Args:
        library: made by :func:`compiled`.
        name: the operators' namespace in it.
    """

    def __init__(self, library: Path, name: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self.ops = getattr(torch.ops, name)

    @contextmanager
    def memory(self, where: str) -> Iterator[None]:
        """Puts what torch allocates between guard pages: at the ``"begin"`` of its pages, or up to their ``"end"``.

        All of its bits are set, where torch's own filling would leave the lower half of a float64 at 0.
        """
        filled = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = False
        self._library.guard_memory(MEMORY[where])
        try:
            yield
        finally:
            self._library.guard_memory(MEMORY["torch"])
            torch.utils.deterministic.fill_uninitialized_memory = filled

    def choose_chip(self, *limits: int) -> None:
        """Runs on a chip of so many SMs, bytes of shared memory a block and an SM, and blocks of a cluster at most."""
        self._library.choose_chip(*(ctypes.c_int64(limit) for limit in limits))

    def reorder(self, seed: int) -> None:
        """Lets threads, blocks and copies take turns in another order."""
        ctypes.c_uint64.in_dll(self._library, "order").value = 2 * seed + 1

    def launches(self) -> int:
        """How many kernels have been launched so far."""
        return ctypes.c_int.in_dll(self._library, "launches").value

    def plant(self, bug: int) -> None:
        """Switches a bug on, where the library has some; 0 none."""
        ctypes.c_int.in_dll(self._library, "planted").value = bug


def cuda_headers() -> list[str]:
    """Folders that hold cuda_bf16.h: the toolkit's, or that of the package."""
    folders = (*nvidia_package("cu13/include"), Path("/usr/local/cuda/include"))
    return [str(folder) for folder in folders if (folder / "cuda_bf16.h").is_file()]


def compiled(folder: Path, name: str, sources: Callable[[Path], Path] = lambda folder: SOURCES) -> Emulation:
    """Compiles the CUDA operators for the host, once for all processes that share ``folder``.

    Args:
        folder: where the library goes.
        name: the namespace the operators get.
        sources: makes the sources in a folder of their own, and returns where they are.
    """
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or not headers:
        pytest.skip("needs g++ and the headers of CUDA")
    from torch.utils.cpp_extension import include_paths, library_paths  # not on a bare machine with a GPU

    library = folder / f"{name}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            emulation, unfinished = ROOT / "tests/ops/emulation", folder / f"{name}.unfinished"
            command = [compiler, *FLAGS.split(), f"-Djdkd_C={name}", "-DUSE_CUDA", f"-I{sources(folder / name)}"]
            command += [f"-I{emulation}", str(emulation / "kernels.cpp"), "-o", str(unfinished)]
            command += [flag for include in (*include_paths("cpu"), *headers) for flag in ("-isystem", include)]
            command += [*(f"-L{path}" for path in library_paths("cpu")), "-ltorch", "-ltorch_cpu", "-lc10"]
            subprocess.run(command, check=True, timeout=300)
            os.replace(unfinished, library)
    return Emulation(library, name)


def placed(level: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` elements into its memory, and ends where that ends."""
    memory = torch.full((offset + level.numel(),), float("nan"), dtype=level.dtype)
    return memory.as_strided(level.shape, level.stride(), offset).copy_(level.detach())
