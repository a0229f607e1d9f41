"""Noticing losses and gradients that are not finite, without waiting for the GPU at every step."""

import torch
from torch import Tensor

from jdkd.errors import ModelError

NEVER = torch.iinfo(torch.int64).max
GRADIENT = "gradient norm"


class DivergenceError(ModelError):
    """A loss or gradient became NaN or infinite; the last good checkpoint was kept.

    Attributes:
        step: the first step (from 1) at which it happened.
        what: the losses, and the parts of them that are known, or ``"gradient norm"``.
    """

    def __init__(self, message: str, step: int, what: str) -> None:
        super().__init__(message)
        self.step = step
        self.what = what


class NonFiniteMonitor:
    """Remembers, where the values live, the first step at which each watched value was not finite."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, ...], Tensor] = {}

    def observe(self, step: int, names: tuple[str, ...], values: Tensor) -> None:
        """Takes in the values (``[len(names)]``) of a step, without a host synchronisation."""
        seen = torch.full_like(values, NEVER, dtype=torch.int64, requires_grad=False)  # [len(names)]
        seen.masked_fill_(~torch.isfinite(values.detach()), step)
        before = self._first.get(names)
        self._first[names] = seen if before is None else torch.minimum(before, seen)

    def first(self) -> tuple[int, str] | None:
        """The first step at which something was not finite, and what that was; None if all was well.

        Of losses and the gradient that they have, the losses are named. Synchronises.
        """
        found = [
            (step, name)
            for names, steps in self._first.items()
            for step, name in zip(steps.tolist(), names, strict=True)
            if step != NEVER
        ]
        if not found:
            return None
        first = min(step for step, _ in found)
        names = [name for step, name in found if step == first]
        return first, ", ".join([name for name in names if name != GRADIENT] or names)
