"""In which form the Pearson loss is computed: the first row of :data:`TABLE` that takes a call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _backend
from jdkd._dispatch import Candidate, Condition, Table, all_of, is_tuned, nobody_asks
from jdkd._verdicts import dtype_name
from jdkd.ops import pearson_single
from jdkd.ops.layout import size_class

NAME = "pearson forms"


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

    @property
    def device(self) -> torch.device:
        return self.students[0].device


class _SinglePass(NamedTuple):
    """The kernels of the single pass: what is asked of the loss is asked of its forms."""

    backend: str = "cuda"

    def asked(self, call: LossCall) -> str | None:
        return _backend.requested()

    def unseen(self, call: LossCall, check: bool) -> str | None:
        return pearson_single.unseen(call.device, call.students[0].dtype, check)


_MOMENTS = Condition("a padding mask, or statistics over several processes", lambda call: call.masked or call.grouped)
_WHOLE = Condition("no padding mask, and statistics of this process", lambda call: not (call.masked or call.grouped))
_TAP = Condition("features that go on to heads", lambda call: call.tap)
_NO_TAP = Condition("features that go nowhere else", lambda call: not call.tap)
_FITS = Condition(
    "contiguous float32 or bfloat16 features whose channels fit on chip, on sm_90, or in the caches of a CPU, and "
    "gradients of students only, eagerly",
    lambda call: (
        call.gradients == "students"
        and not call.instance
        and not torch.compiler.is_compiling()
        and pearson_single.fits(call.students, call.teachers)
    ),
)
_WAITS = {
    "cpu": "only where `jdkd tune` found it faster, as it keeps a gradient from the forward on",
    "cuda": "only on request (backend cuda) or where `jdkd tune` found it faster, since it has not run on a GPU yet",
}


def _region(call: LossCall) -> str | None:
    """What the single pass and the split form are timed by: dtype, and bytes of one side's features."""
    if call.gradients != "students" or call.tap or call.masked or call.grouped:
        return None
    level = call.students[0]
    size = sum(student.numel() for student in call.students) * level.element_size()
    return f"{dtype_name(level.dtype)}, {size_class(size)}"


FORMS = (
    Candidate(
        "moments",
        "the statistics are needed before the loss: masked ones are taken in plain torch, those of processes gathered",
        _MOMENTS.words,
        all_of(_MOMENTS),
    ),
    Candidate(
        "tap",
        "6 passes over the features with the heads' gradient added, where a separate loss makes 8",
        _TAP.words,
        all_of(_TAP, _WHOLE),
    ),
    Candidate(
        "single pass",
        "3 passes over memory, not 5, the gradient computed in the forward; not in float16, where a gradient that is "
        "not scaled yet rounds to 0",
        f"{_FITS.words}; {'; '.join(f'{device}: {when}' for device, when in _WAITS.items())}",
        all_of(_NO_TAP, _WHOLE, _FITS),
        _SinglePass(),
        lambda call: _WAITS.get(call.device.type, _WAITS["cuda"]),
    ),
    Candidate(
        "split",
        "2 passes for the loss and 3 for a gradient; nothing is kept but five numbers a channel",
        "everything else: any device, layout, dtype and size, with or without gradients",
        all_of(_NO_TAP, _WHOLE),
    ),
)
TABLE = Table(NAME, FORMS, _region)


def _by_kind() -> dict[tuple, str]:
    """The usual form of every kind of call, which is all of it but the levels: where nobody asks for a backend."""
    levels, sides = [torch.empty(0, device="meta")], ("", "students", "teachers")
    kinds = itertools.product(sides, *[(False, True)] * 4)
    order = Table("", tuple(form for form in FORMS if form.kernel is None))
    return {kind: order.choose(LossCall(levels, levels, *kind))[0].name for kind in kinds}


_BY_KIND = _by_kind()


def select(call: LossCall) -> str:
    """Returns: the name of the form that computes a call; at once, where no other than the usual one can."""
    usual = _BY_KIND[call[2:]]
    if usual != "split" or call.gradients != "students":
        return usual
    return usual if nobody_asks() and not is_tuned(NAME, call.device) else looked_up(call)


def looked_up(call: LossCall) -> str:
    """:func:`select` where a form was asked for or measured faster: kept by what the table looks at, so that a choice
    that is made costs a lookup."""
    if torch.compiler.is_compiling() or not nobody_asks():
        return TABLE.choose(call)[0].name
    levels = ((level.shape, level.is_contiguous(), level.dtype, level.device) for level in (*call[0], *call[1]))
    key = (NAME, call[2:], torch.get_num_threads(), *levels)
    return TABLE.remembered(call, key)
