"""The backend table: which implementations an operator has, and which one runs on a given tensor.

An op file registers what it implements once, best first, and asks at every call::

    # jdkd/ops/pearson.py
    _DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    _CHECKS = {"loss": _check_loss, "gradient": _check_gradient}
    _backend.register("pearson", "triton", dtypes=_DTYPES, checks=_CHECKS)
    _backend.register("pearson", "cuda", dtypes=_DTYPES, checks=_CHECKS, why="not timed on a GPU yet")
    _backend.register("pearson", "cpu", dtypes=_DTYPES, checks=_CHECKS)
    _backend.register("pearson", "reference")

    def _forward(student, teacher):
        return _FORWARD[_backend.select("pearson", student, "loss")](student, teacher)

``cuda`` and ``cpu`` are compiled operators of ``jdkd._C`` (whether this build has them is asked of
:mod:`jdkd._ext` under the same op name), ``triton`` runs on CUDA tensors, and on CPU tensors only through
Triton's interpreter (``TRITON_INTERPRET=1``) and only when asked for; ``reference`` is plain torch and runs
everywhere.

**One rule**: by default a kernel runs on a device only after it was seen right there. The first use of a form (the
forward of an operator, its gradient) in a dtype runs its check against float64, see :mod:`jdkd._verdicts`, which keeps
the verdict. What is wrong or cannot be checked is left out, and said once. While a CUDA graph is captured or a program
is traced nothing is checked, and what runs is what was seen right before, ``reference`` if nothing was. What is asked
for by ``use_backend`` or ``JDKD_BACKEND`` runs unchecked: that is how a fault is reproduced, timed and mended. Where it
is known to be wrong, a notice says so once.

The choice is made when the operator runs: a backward pass that is run after ``use_backend`` was left picks
again, so what a forward saves must be readable by the backward of every backend.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from jdkd import _dispatch, _ext, _verdicts
from jdkd._verdicts import Check, Subject, Verdict
from jdkd.errors import InputError
from jdkd.notices import say_once

BACKENDS = ("cuda", "triton", "cpu", "reference")
VARIABLE = "JDKD_BACKEND"

if os.environ.get("JDKD_CACHE"):
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(os.environ["JDKD_CACHE"], "triton"))


class _Call(NamedTuple):
    """What the choice of a backend depends on."""

    form: str
    device: torch.device
    dtype: torch.dtype


class _Backend(NamedTuple):
    """One implementation of an operator."""

    op: str
    name: str
    dtypes: tuple[torch.dtype, ...] | None
    why: str
    checks: Mapping[str, Check]

    def why_not(self, call: _Call) -> str | None:
        """Why it does not run unasked, or None; checks it if that was never done."""
        if reason := self.why_no_default(call.device, call.dtype):
            return reason
        return why_unseen(Subject(self.op, call.form, self.name, call.device, call.dtype))

    def why_no_default(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The same as far as device and dtype tell."""
        if self.name == "triton" and device.type == "cpu":
            return "Triton's interpreter runs only when it is asked for"
        return _why_refused(self.op, self.name, device.type, dtype)


_table: dict[str, dict[str, _Backend]] = {}
_chosen: dict[tuple, str] = {}  # what was settled, by the arguments of _choose
# Process-wide and no context variable: autograd runs backward passes on threads of its own.
_forced: str | None = None


def register(
    op: str,
    backend: str,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    why: str = "",
    checks: Mapping[str, Check] | None = None,
) -> None:
    """Adds one implementation to an operator's row; the order of registration is the order of preference.

    Args:
        op: noun stem of the operator; for compiled backends the stem of its files in ``csrc/``.
        backend: one of :data:`BACKENDS`.
        dtypes: dtypes it takes; None means all.
        why: what speaks for it or keeps it at its place in the order, one clause for ``jdkd env``.
        checks: of each of its forms, see :func:`jdkd._verdicts.found`; a kernel without one is never a default.

    Raises:
        InputError: on a name that is no backend.
    """
    _table.setdefault(op, {})[_validated(backend, "backend")] = _Backend(op, backend, dtypes, why, checks or {})
    _chosen.clear()


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


def forms(op: str) -> tuple[str, ...]:
    """Returns: the forms in which an operator runs, by name."""
    return tuple(dict.fromkeys(form for entry in _row(op).values() for form in entry.checks))


def subjects(op: str, backend: str, device: torch.device) -> list[Subject]:
    """Returns: what can be checked of a backend on a device: its forms in every dtype that it takes."""
    entry = _row(op)[backend]
    return [Subject(op, form, backend, device, dtype) for form in entry.checks for dtype in entry.dtypes or ()]


def check(subject: Subject) -> Verdict:
    """Checks a form anew, whatever is known of it, and keeps the verdict."""
    _verdicts.forget(subject)
    verdict = _verdicts.checked(subject, _row(subject.op)[subject.backend].checks[subject.form])
    _chosen.clear()
    return verdict


def select(op: str, tensor: torch.Tensor, form: str = "") -> str:
    """Picks the backend that runs a form of ``op`` on ``tensor``.

    ``use_backend`` comes first and is strict. ``JDKD_BACKEND`` comes next: it speaks for a whole program, so
    an operator without that backend keeps its own order. Otherwise the first registered one that is available,
    takes the tensor's device and dtype, and was seen right there.

    Args:
        op: noun stem of the operator.
        tensor: any shape; only its device and dtype are looked at.
        form: what of the operator is to run, one of :func:`forms`; by default the first of them.

    Returns:
        One of :data:`BACKENDS`.

    Raises:
        InputError: if the backend asked for does not exist, is not available, or cannot take the tensor.
    """
    key = (op, form, tensor.device, tensor.dtype, _forced, os.environ.get(VARIABLE))
    found = _chosen.get(key)
    return _choose(*key) if found is None else found


def choice(op: str, form: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Says which backend :func:`select` picks and from where that comes; nothing is checked.

    Args:
        op: noun stem of the operator.
        form: one of :func:`forms`.
        device: of a call.
        dtype: of a call.

    Returns:
        One of :data:`BACKENDS`, and one clause.
    """
    if wanted := _asked_for(op, _forced, os.environ.get(VARIABLE)):
        return wanted, "use_backend asks for it" if _forced else f"{VARIABLE} asks for it"
    before = []
    for backend, row in _row(op).items():
        if row.why_no_default(device, dtype):
            continue
        if backend == "reference":
            return backend, "; ".join([*before, "the first that is available"])
        verdict = _verdicts.known(Subject(op, form, backend, device, dtype))
        if verdict is None:
            return backend, "; ".join([*before, "available, and checked on first use: reference if it is wrong then"])
        if verdict.state == _verdicts.RIGHT:
            where = "read from the cache" if verdict.cached else "checked by this process"
            return backend, "; ".join([*before, f"seen right on this device ({verdict}; {where})"])
        before.append(f"{backend} is left out: {verdict}")
    return "none", "; ".join([*before, f"none takes {_dtype_text(dtype)} on {device.type}"])


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


def _row(op: str) -> dict[str, _Backend]:
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


def _choose(
    op: str, form: str, device: torch.device, dtype: torch.dtype, forced: str | None, variable: str | None
) -> str:
    """The backend of a call; kept, unless a kernel could not be checked now."""
    key = (op, form, device, dtype, forced, variable)
    form = form or next(iter(forms(op)), "")
    wanted = _asked_for(op, forced, variable)
    if wanted is not None:
        _check_asked_for(op, wanted, form, device, dtype)
        _chosen[key] = wanted
        return wanted
    found, is_settled = _dispatch.first(_row(op).values(), _Call(form, device, dtype))
    if found is not None:
        if is_settled:
            _chosen[key] = found.name
        return found.name
    raise InputError(f"no backend of {op} takes {_dtype_text(dtype)} tensors on {device.type}")


def _asked_for(op: str, forced: str | None, variable: str | None) -> str | None:
    """The backend that ``use_backend`` or else ``JDKD_BACKEND`` asks of an operator, if any."""
    if variable and _validated(variable, VARIABLE) not in _row(op):
        variable = None
    return forced or variable or None


def _check_asked_for(op: str, backend: str, form: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError if what was asked for cannot run; says so if it is known to be wrong."""
    if backend not in _row(op):
        raise InputError(f"{op} has no backend {backend!r}; choose one of {', '.join(_row(op))}")
    if reason := _why_refused(op, backend, device.type, dtype):
        raise InputError(f"backend {backend!r} of {op} cannot run: {reason}")
    subject = Subject(op, form, backend, device, dtype)
    verdict = _verdicts.known(subject) if form in _row(op)[backend].checks else None
    if verdict is not None and verdict.state != _verdicts.RIGHT:
        say_once(f"{subject} runs because it was asked for, and was found wrong on this device: {verdict}")


def why_unseen(subject: Subject) -> str | None:
    """Why a form may not run unasked on a device, as far as :func:`seen_right` tells; None if it may."""
    seen = seen_right(subject)
    if seen is None:
        return _dispatch.NOT_YET
    return None if seen else "it was checked on this device and not seen right"


def seen_right(subject: Subject) -> bool | None:
    """Whether a form may run unasked on a device; checks it if that was never done. What may not is said once.

    Args:
        subject: a form of a backend that can run on the device.

    Returns:
        None where that is not known and cannot be found out now, while a graph is captured or a program traced.
    """
    if subject.backend == "reference":
        return True
    check = _row(subject.op)[subject.backend].checks.get(subject.form)
    if check is None:
        return False
    verdict = _verdicts.found(subject, check)
    if verdict is None or verdict.state == _verdicts.RIGHT:
        return None if verdict is None else True
    say_once(
        f"{subject} is left out, since it "
        f"{'is wrong' if verdict.state == _verdicts.WRONG else 'could not be checked'} on this device: {verdict}. "
        f"Another backend runs instead. Please report this line, with {_verdicts.report(subject.device)}; "
        "`jdkd check` checks all kernels again.",
        key=f"{subject} on {subject.device}",
    )
    return False


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
