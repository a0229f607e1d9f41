"""How one of several ways to compute something is picked: the one rule of the house.

A :class:`Table` lists :class:`candidates <Candidate>` in order of preference. The backends of an operator
(:mod:`jdkd._backend`), the kernels of an elastic convolution (:mod:`jdkd.ops.elastic_kernels`) and of the levels of a
pyramid (:mod:`jdkd.ops.elastic_levels_kernels`), the forms of the Pearson loss (:mod:`jdkd.ops.pearson_forms`), and
what runs a convolution of an accelerated model (:mod:`jdkd.patch.convolutions`) are such tables. What is picked is the
first candidate that

1. can compute the call, and
2. was asked for, by ``use_backend`` or else ``JDKD_BACKEND``; or, where nobody asks, does not wait to be, and was seen
   right on this device if it is a kernel.

``jdkd tune`` times the candidates of a table by regions of calls. One that was faster than the default in a region goes
before the others there, and waits for nobody; see :mod:`jdkd._tuned`.

No candidate looks at a value of a tensor or waits for the device, and a choice is a row of its table, the same object
in eager, compiled and captured calls.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from jdkd import _tuned
from jdkd.errors import InputError

BACKENDS = ("cuda", "triton", "cpu", "reference")
VARIABLE = "JDKD_BACKEND"
NOT_YET = "it was not checked on this device yet, and is not while a graph is captured or a program traced"

# Process-wide and no context variable: autograd runs backward passes on threads of its own.
_forced: str | None = None
settled: dict[Hashable, Any] = {}  # choices that stay as they are, by what they were made of


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
    before, _forced = _forced, validated(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def validated(name: str, source: str) -> str:
    """A backend's name; raises InputError, which names the ``source``, on any other."""
    if name not in BACKENDS:
        raise InputError(f"{source}: there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


def request(backends: Any) -> tuple[str, str] | None:
    """What is asked of those who have some backends, and who asks.

    ``use_backend`` is strict, and asks whoever it meets; ``JDKD_BACKEND`` speaks for a whole program, and only to who
    has that backend.

    Args:
        backends: that there are, a collection of names.

    Raises:
        InputError: if ``JDKD_BACKEND`` is no backend.
    """
    if _forced:
        return _forced, "use_backend asks for it"
    variable = os.environ.get(VARIABLE)
    if variable and validated(variable, VARIABLE) in backends:
        return variable, f"{VARIABLE} asks for it"
    return None


def forget() -> None:
    """Every choice is made anew: verdicts, or what was measured, are others now."""
    settled.clear()
    _tuned.forget()


class Kernel(Protocol):
    """Code of ours that must be seen right on a device before it runs there unasked."""

    @property
    def backend(self) -> str:
        """The name by which it is asked for."""

    def asked(self, call: Any) -> str | None:
        """The backend that is asked for, if any; raises InputError where that cannot run."""

    def unseen(self, call: Any, check: bool) -> str | None:
        """Why it may not run unasked, or None; checks it if that was never done, unless it is not to."""


def _nothing(call: Any) -> None:
    return None


class Condition(NamedTuple):
    """What a call must be for a candidate to take it, in words too."""

    words: str
    holds: Callable[[Any], bool]


def all_of(*conditions: Condition) -> Callable[[Any], str | None]:
    """What a candidate says that takes calls for which all conditions hold."""

    def can_run(call: Any) -> str | None:
        for words, holds in conditions:
            if not holds(call):
                return f"it takes {words}"
        return None

    return can_run


class Candidate(NamedTuple):
    """One way to compute something.

    Args:
        name: what explanations and `jdkd tune` call it.
        why: what speaks for it, one clause.
        when: what it takes, in words.
        can_run: why it cannot compute a call, one clause; None if it can.
        kernel: what must be seen right before it runs unasked; None for plain torch.
        waits: why it does not compute a call unless it is asked for, or was measured faster here; None if it does.
    """

    name: str
    why: str
    when: str = "everything else"
    can_run: Callable[[Any], str | None] = _nothing
    kernel: Kernel | None = None
    waits: Callable[[Any], str | None] | None = None

    def why_not(self, call: Any, is_tuned: bool, check: bool = True) -> str | None:
        """Why it does not compute a call, one clause; None if it does.

        Args:
            call: what the table decides by.
            is_tuned: whether it measured faster here than the default.
            check: whether a kernel is checked now that was not before.

        Raises:
            InputError: if a backend that cannot run here is asked for.
        """
        waits = None if is_tuned or self.waits is None else self.waits(call)
        if waits and nobody_asks():
            return waits  # at once: whether it can run may take a while to tell
        if reason := self.can_run(call):
            return reason
        if self.kernel is not None and (asked := self.kernel.asked(call)):
            return None if asked == self.kernel.backend else f"the backend {asked} was asked for"
        return waits if waits or self.kernel is None else self.kernel.unseen(call, check)


class Explanation(NamedTuple):
    """Why a call is computed as it is.

    Args:
        candidate: that computes it.
        source: from where the choice comes: ``"default"``, ``"checked"``, ``"tuned on"`` what and when, or that it was
            asked for.
        others: names of the other candidates, and why each is not taken.
    """

    candidate: Candidate
    source: str
    others: tuple[tuple[str, str], ...]


class Table(NamedTuple):
    """The ways to compute something.

    Args:
        name: what `jdkd tune` keeps its measurements under.
        candidates: the preferred one first. Each says for itself what it takes, whatever comes before it.
        region: of a call, which has a ``device``: what it must share with another to be computed alike; or None, where
            only the order counts.
    """

    name: str
    candidates: tuple[Candidate, ...]
    region: Callable[[Any], str | None] = _nothing

    def choose(self, call: Any, check: bool = True) -> tuple[Candidate | None, bool]:
        """The candidate that computes a call, if one can.

        Args:
            call: what the candidates decide by.
            check: as of :meth:`Candidate.why_not`.

        Returns:
            The candidate, and whether it stays so: one before it that is not checked yet may take the same call later.

        Raises:
            InputError: if a backend that cannot run here is asked for.
        """
        tuned, is_settled = self.tuned(call), True
        for candidate in self.candidates if tuned is None else self._beginning_with(tuned):
            reason = candidate.why_not(call, candidate.name == tuned, check)
            if reason is None:
                return candidate, is_settled
            is_settled = is_settled and reason != NOT_YET
        return None, is_settled

    def remembered(self, call: Any, key: Hashable) -> str:
        """Name of the candidate that computes a call: kept, once it stays so, by all that the choice was made of.

        Args:
            call: as of :meth:`choose`; some candidate takes it.
            key: what is the same for calls that are computed alike.
        """
        if (found := settled.get(key)) is None:
            candidate, is_settled = self.choose(call)
            found = candidate.name
            if is_settled and len(settled) < 1024:
                settled[key] = found
        return found

    def tuned(self, call: Any) -> str | None:
        """Name of the candidate that measured faster than the default in the region of a call, if one did."""
        if not is_tuned(self.name, call.device):
            return None
        return _tuned_path(self.name, self.region(call), call.device)

    def explain(self, call: Any, check: bool = True) -> Explanation:
        """Why a call is computed as it is, which one candidate must take; arguments and errors as of :meth:`choose`."""
        chosen, _ = self.choose(call, check)
        tuned = self.tuned(call)
        others = [row for row in self.candidates if row is not chosen]
        reasons = (row.why_not(call, row.name == tuned, check) or f"{chosen.name} comes first" for row in others)
        kernel = chosen.kernel
        source = "default" if kernel is None or kernel.backend == "reference" else "checked on this device"
        if kernel is not None and kernel.asked(call):
            source = "it was asked for"
        elif chosen.name == tuned:
            source = _tuned.told(self.name, self.region(call), call.device)
        return Explanation(chosen, source, tuple((row.name, why) for row, why in zip(others, reasons, strict=True)))

    def _beginning_with(self, name: str) -> tuple[Candidate, ...]:
        return tuple(sorted(self.candidates, key=lambda row: row.name != name))


def is_tuned(table: str, device: torch.device, beginning: str = "") -> bool:
    """Whether another candidate than the default measured faster in a region of a table, one whose name begins so; a
    request puts that aside."""
    return _tuned.has_winners(table, device, beginning) and requested() is None


def nobody_asks() -> bool:
    """Whether no backend is asked for."""
    return requested() is None


def _tuned_path(table: str, region: str | None, device: torch.device) -> str | None:
    return None if region is None else _tuned.path(table, region, device)


# What torch.compiler.assume_constant_result sets; calling that would load the whole compiler, and triton with it.
for _constant in (is_tuned, nobody_asks, _tuned_path):
    _constant._dynamo_marked_constant = True
