"""In which form the Pearson loss is computed: the first row of :data:`FORMS` that takes a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _backend, _dispatch
from jdkd.ops import pearson_single


class LossCall(NamedTuple):
    """What the choice depends on.

    Args:
        students: levels ``[N, C, H, W]``, dense.
        teachers: levels of the same shapes.
        gradients: whose gradients are wanted: ``""``, ``"students"``, or ``"teachers"`` if theirs are too.
        tap: the students go on to heads.
        masked: padded positions do not count.
        grouped: statistics over several processes.
        instance: statistics of every image by itself.
    """

    students: Sequence[Tensor]
    teachers: Sequence[Tensor]
    gradients: str = ""
    tap: bool = False
    masked: bool = False
    grouped: bool = False
    instance: bool = False


class Form(NamedTuple):
    """One way to compute loss and gradient: whether it takes a call, and that in words, with the reason."""

    name: str
    takes: Callable[[LossCall], bool]
    when: str
    why: str

    def why_not(self, call: LossCall) -> str | None:
        """Why it does not compute a call, or None if it does."""
        return None if self.takes(call) else f"it takes {self.when}"


def _in_one_pass(call: LossCall) -> bool:
    return (
        call.gradients == "students"
        and not call.instance
        and not torch.compiler.is_compiling()
        and _backend.requested() == "cuda"
        and pearson_single.fits(call.students, call.teachers)
    )


FORMS = (
    Form(
        "moments",
        lambda call: call.masked or call.grouped,
        "a padding mask, or statistics over several processes",
        "the statistics are needed before the loss: masked ones are taken in plain torch, those of processes gathered",
    ),
    Form(
        "tap",
        lambda call: call.tap,
        "features that go on to heads",
        "6 passes over the features with the heads' gradient added, where a separate loss makes 8",
    ),
    Form(
        "single pass",
        _in_one_pass,
        "on request (backend cuda) on sm_90: contiguous float32 or bfloat16 features that fit on chip, gradients of "
        "students only",
        "3 passes instead of 5, the gradient computed in the forward; not in float16, where a gradient that is not "
        "scaled yet rounds to 0; on request, since it has not run on a GPU yet",
    ),
    Form(
        "split",
        lambda call: True,
        "everything else: any device, layout, dtype and size, with or without gradients",
        "2 passes for the loss and 3 for a gradient; nothing is kept but five numbers a channel",
    ),
)


def select(call: LossCall) -> str:
    """Returns: the name of the form that computes a call."""
    return _dispatch.first(FORMS, call)[0].name
