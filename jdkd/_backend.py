"""The backends of operators: which implementations an operator has, and which one runs on a given tensor.

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
is known to be wrong, a notice says so once. How the rule is applied, to backends and to all else that there is to
choose, is in :mod:`jdkd._dispatch`.

The choice is made when the operator runs: a backward pass that is run after ``use_backend`` was left picks
again, so what a forward saves must be readable by the backward of every backend.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _dispatch, _ext, _verdicts
from jdkd._dispatch import BACKENDS, VARIABLE, Candidate, Table, request, requested, use_backend, validated
from jdkd._verdicts import Check, Subject, Verdict, dtype_name
from jdkd.errors import InputError
from jdkd.notices import say_once

__all__ = ["BACKENDS", "VARIABLE", "requested", "use_backend"]  # of the dispatch, and asked for here

if os.environ.get("JDKD_CACHE"):
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(os.environ["JDKD_CACHE"], "triton"))


class Call(NamedTuple):
    """What the choice of a backend depends on; of the tensor, where it is known, only how it lies in memory."""

    form: str
    device: torch.device
    dtype: torch.dtype
    tensor: Tensor | None = None


class Kernel(NamedTuple):
    """A backend of an operator, as :class:`jdkd._dispatch.Candidate` has it; a call names form, device and dtype."""

    op: str
    backend: str

    def asked(self, call: Call) -> str | None:
        """The backend that is asked of the operator, if any; raises InputError where that cannot run."""
        return _asked(self.op, call.form, call.device, call.dtype)

    def unseen(self, call: Call, check: bool) -> str | None:
        """Why it may not run unasked, or None: it must be there, and have been seen right on the device."""
        return _unseen(self.op, call.form, self.backend, call.device, call.dtype, check)


class _Backend(NamedTuple):
    """One implementation of an operator, and the row of its table."""

    dtypes: tuple[torch.dtype, ...] | None
    checks: Mapping[str, Check]
    candidate: Candidate


_table: dict[str, dict[str, _Backend]] = {}
_regions: dict[str, Callable[[Call], str]] = {}
_chosen = _dispatch.settled  # what was settled, by the arguments of _choose
_environment = os.environ.get  # looked up once, as it is called at every call


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

    def can_run(call: Call) -> str | None:
        return _why_refused(op, backend, call.device.type, call.dtype)

    def waits(call: Call) -> str | None:
        is_interpreted = backend == "triton" and call.device.type == "cpu"
        return "Triton's interpreter runs only when it is asked for" if is_interpreted else None

    candidate = Candidate(validated(backend, "backend"), why, "", can_run, Kernel(op, backend), waits)
    _table.setdefault(op, {})[backend] = _Backend(dtypes, checks or {}, candidate)
    _chosen.clear()


def tune_by(op: str, region: Callable[[Tensor], str]) -> None:
    """Lets `jdkd tune` choose among the backends of an operator.

    Args:
        op: noun stem of the operator.
        region: of the tensor that :func:`select` is given, see :class:`jdkd._dispatch.Table`; form and dtype are
            added.
    """
    _regions[op] = lambda call: region_name(call.form, call.dtype, region(call.tensor))


def region_name(form: str, dtype: torch.dtype, rest: str) -> str:
    """The region of a form of an operator in a dtype."""
    return ", ".join(filter(None, (form, dtype_name(dtype), rest)))


def table_of(op: str) -> Table:
    """The backends of an operator as a table."""
    candidates = tuple(row.candidate for row in _row(op).values())
    return Table(op, candidates, _regions[op]) if op in _regions else Table(op, candidates)


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
    return {backend: entry.candidate.why for backend, entry in _row(op).items()}


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
    an operator without that backend keeps its own order. Otherwise the one that measured fastest here, or else the
    first registered one, that is available, takes the tensor's device and dtype, and was seen right there.

    Args:
        op: noun stem of the operator.
        tensor: any shape; looked at are its device and dtype and, where a measurement depends on them, size and layout.
        form: what of the operator is to run, one of :func:`forms`; by default the first of them.

    Returns:
        One of :data:`BACKENDS`.

    Raises:
        InputError: if the backend asked for does not exist, is not available, or cannot take the tensor.
    """
    key = (op, form, tensor.device, tensor.dtype, _dispatch._forced, _environment(VARIABLE))
    found = _chosen.get(key)
    return _choose(key, tensor) if found is None else found


def choice(op: str, form: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Says which backend :func:`select` picks where nothing was tuned, and from where that comes; nothing is checked.

    Args:
        op: noun stem of the operator.
        form: one of :func:`forms`.
        device: of a call.
        dtype: of a call.

    Returns:
        One of :data:`BACKENDS`, and one clause.
    """
    if wanted := request(_row(op)):
        return wanted
    table, said = table_of(op), []
    found, _ = Table(op, table.candidates).choose(Call(form, device, dtype), check=False)
    for row in table.candidates:
        verdict = _verdicts.known(Subject(op, form, row.name, device, dtype))
        if row.name == "reference":
            said.append("default: the first that is available")
        elif row is found and verdict is None:
            said.append("default: available, and checked on first use: reference if it is wrong then")
        elif row is found:
            where = "read from the cache" if verdict.cached else "checked by this process"
            said.append(f"checked: seen right on this device ({verdict}; {where})")
        elif verdict is not None and verdict.state != _verdicts.RIGHT:
            said.append(f"{row.name} is left out: {verdict}")
        if row is found:
            return found.name, "; ".join(said)
    return "none", "; ".join([*said, f"none takes {dtype_name(dtype)} on {device.type}"])


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
        return f"it takes {', '.join(map(dtype_name, dtypes))}, and this tensor is {dtype_name(dtype)}"
    return _why_unavailable(op, backend)


def _choose(key: tuple, tensor: Tensor) -> str:
    """The backend of a call; kept, unless a kernel could not be checked now."""
    op, form, device, dtype, *_ = key
    call = Call(form or next(iter(forms(op)), ""), device, dtype, tensor)
    by_region = ("by region", *key)
    is_known = by_region in _chosen
    if is_known or (op in _regions and _dispatch.is_tuned(op, device, region_name(call.form, dtype, ""))):
        _chosen[by_region] = "by region"
        key = (*key, _regions[op](call))
        if (before := _chosen.get(key)) is not None:
            return before
    found, is_settled = table_of(op).choose(call)
    if found is None:
        raise InputError(f"no backend of {op} takes {dtype_name(dtype)} tensors on {device.type}")
    if is_settled:
        _chosen[key] = found.name
    return found.name


def _asked(op: str, form: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend that is asked of an operator, if any; raises InputError if that cannot run."""
    if (wanted := request(_row(op))) is None:
        return None
    key = (op, form, device, dtype, *wanted)
    if key not in _chosen:
        _check_asked_for(op, wanted[0], form, device, dtype)
        _chosen[key] = wanted[0]
    return wanted[0]


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


def _unseen(
    op: str, form: str, backend: str, device: torch.device, dtype: torch.dtype, check: bool = True
) -> str | None:
    """Why a kernel may not run unasked, or None: it must be there, and have been seen right on the device."""
    if backend == "reference":
        return None
    if reason := _why_refused(op, backend, device.type, dtype):
        return reason
    subject = Subject(op, form, backend, device, dtype)
    if not check:
        verdict = _verdicts.known(subject)
        return None if verdict is None or verdict.state == _verdicts.RIGHT else str(verdict)
    if (seen := seen_right(subject)) is None:
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


# What torch.compiler.assume_constant_result sets; calling that would load the whole compiler, and triton with it.
for _constant in (_asked, _unseen):
    _constant._dynamo_marked_constant = True
