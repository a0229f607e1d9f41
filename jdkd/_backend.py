"""The backend table: which implementations an operator has, and which one runs on a given tensor.

An op file registers what it implements once, best first, and asks at every call::

    # jdkd/ops/pearson.py
    _DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    _backend.register("pearson", "cuda", dtypes=_DTYPES, why="compiled: no stall when a program starts")
    _backend.register("pearson", "triton", dtypes=_DTYPES)
    _backend.register("pearson", "cpu", dtypes=_DTYPES)
    _backend.register("pearson", "reference")

    def _forward(student, teacher):
        return _FORWARD[_backend.select("pearson", student)](student, teacher)

``cuda`` and ``cpu`` are compiled operators of ``jdkd._C`` (whether this build has them is asked of
:mod:`jdkd._ext` under the same op name), ``triton`` runs on CUDA tensors, and on CPU tensors only through
Triton's interpreter (``TRITON_INTERPRET=1``) and only when asked for; ``reference`` is plain torch and runs
everywhere.

The choice is made when the operator runs: a backward pass that is run after ``use_backend`` was left picks
again, so what a forward saves must be readable by the backward of every backend.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from jdkd import _ext
from jdkd.errors import InputError

BACKENDS = ("cuda", "triton", "cpu", "reference")
VARIABLE = "JDKD_BACKEND"

if os.environ.get("JDKD_CACHE"):
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(os.environ["JDKD_CACHE"], "triton"))


class _Entry(NamedTuple):
    dtypes: tuple[torch.dtype, ...] | None
    why: str


_table: dict[str, dict[str, _Entry]] = {}
# Process-wide and no context variable: autograd runs backward passes on threads of its own.
_forced: str | None = None


def register(op: str, backend: str, *, dtypes: tuple[torch.dtype, ...] | None = None, why: str = "") -> None:
    """Adds one implementation to an operator's row; the order of registration is the order of preference.

    Args:
        op: noun stem of the operator; for compiled backends the stem of its files in ``csrc/``.
        backend: one of :data:`BACKENDS`.
        dtypes: dtypes it takes; None means all.
        why: what speaks for it or keeps it at its place in the order, one clause for ``jdkd env``.

    Raises:
        InputError: on a name that is no backend.
    """
    _table.setdefault(op, {})[_validated(backend, "backend")] = _Entry(dtypes, why)
    _choose.cache_clear()


def ops() -> tuple[str, ...]:
    """Returns: the registered operators, in order of registration."""
    return tuple(_table)


def available(op: str) -> dict[str, str | None]:
    """Says for each backend of an operator whether this machine can run it.

    Args:
        op: noun stem of the operator.

    Returns:
        Backend names in order of preference, each with None if it is available, else the reason why not.
    """
    return {backend: _why_unavailable(op, backend) for backend in _row(op)}


def explain(op: str) -> dict[str, str]:
    """Says for each backend of an operator why it stands where it stands.

    Args:
        op: noun stem of the operator.

    Returns:
        Backend names in order of preference, each with one clause; empty where nothing was said.
    """
    return {backend: entry.why for backend, entry in _row(op).items()}


def select(op: str, tensor: torch.Tensor) -> str:
    """Picks the backend that runs ``op`` on ``tensor``.

    ``use_backend`` comes first and is strict. ``JDKD_BACKEND`` comes next: it speaks for a whole program, so
    an operator without that backend keeps its own order. Otherwise the first registered one that is available
    and takes the tensor's device and dtype.

    Args:
        op: noun stem of the operator.
        tensor: any shape; only its device and dtype are looked at.

    Returns:
        One of :data:`BACKENDS`.

    Raises:
        InputError: if the backend asked for does not exist, is not available, or cannot take the tensor.
    """
    return _choose(op, tensor.device.type, tensor.dtype, _forced, os.environ.get(VARIABLE) or None)


def requested() -> str | None:
    """Returns: the backend that ``use_backend`` or ``JDKD_BACKEND`` asks for, if any."""
    return _forced or os.environ.get(VARIABLE) or None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator inside the block, in all threads, on one backend.

    Args:
        name: one of :data:`BACKENDS`.

    Raises:
        InputError: on a name that is no backend; and from the operator, if it cannot run there.
    """
    global _forced
    before, _forced = _forced, _validated(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"{source}: there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


def _row(op: str) -> dict[str, _Entry]:
    if op not in _table:
        raise InputError(f"there is no operator {op!r}; registered are {', '.join(_table) or 'none'}")
    return _table[op]


def interpreting() -> bool:
    """Returns: whether Triton kernels run through its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _why_unavailable(op: str, backend: str) -> str | None:
    if backend == "cuda":
        missing = _ext.why_missing(op, "cuda")
        return missing or (None if torch.cuda.is_available() else "no CUDA device is visible")
    if backend == "cpu":
        return _ext.why_missing(op, "cpu")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not interpreting():
            return "no CUDA device is visible, and TRITON_INTERPRET=1 is not set"
    return None


def _why_refused(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    devices = {
        "cuda": ("cuda",),
        "triton": ("cuda", "cpu") if interpreting() else ("cuda",),
        "cpu": ("cpu",),
    }.get(backend)
    if devices and device not in devices:
        hint = "; set TRITON_INTERPRET=1 for tensors on the CPU" if backend == "triton" else ""
        return f"it takes tensors on {' or '.join(devices)}, and this one is on {device}{hint}"
    dtypes = _row(op)[backend].dtypes
    if dtypes is not None and dtype not in dtypes:
        return f"it takes {', '.join(map(_dtype_text, dtypes))}, and this tensor is {_dtype_text(dtype)}"
    return _why_unavailable(op, backend)


@functools.lru_cache(maxsize=256)
def _choose(op: str, device: str, dtype: torch.dtype, forced: str | None, variable: str | None) -> str:
    row = _row(op)
    if variable is not None and _validated(variable, VARIABLE) not in row:
        variable = None
    wanted = forced or variable
    if wanted is None:
        for backend in row:
            by_itself = not (backend == "triton" and device == "cpu")
            if by_itself and _why_refused(op, backend, device, dtype) is None:
                return backend
        raise InputError(f"no backend of {op} takes {_dtype_text(dtype)} tensors on {device}")
    if wanted not in row:
        raise InputError(f"{op} has no backend {wanted!r}; choose one of {', '.join(row)}")
    if reason := _why_refused(op, wanted, device, dtype):
        raise InputError(f"backend {wanted!r} of {op} cannot run: {reason}")
    return wanted


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
