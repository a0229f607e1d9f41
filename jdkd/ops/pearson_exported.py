"""The Pearson loss as an exported program holds it: one operator that carries its own rule for autograd.

``torch.export`` keeps of an ``autograd.Function`` only what its forward ran, so that a program would be trained without
the loss's gradient, and no word said. An operator with a registered rule is kept whole. It costs some ten microseconds
more a call than the Function, so it is used where a program is exported and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jdkd.errors import InputError
from jdkd.ops import pearson
from jdkd.ops.pearson import Settings
from jdkd.reference import pearson as reference


def pearson_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], settings: Settings, masks: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """:func:`jdkd.ops.pearson.pearson_loss` of a program that is exported; it needs jdkd where it is run.

    Args:
        students: levels ``[N, C, H, W]``.
        teachers: levels of the same shapes.
        settings: see :class:`Settings`; without a group.
        masks: see there.

    Returns:
        The loss and its levels ``[L]``, detached.

    Raises:
        InputError: on statistics over several processes.
    """
    weights, eps, skip_constant, instance, group = settings
    if group is not None:
        raise InputError("group is a process group, which an exported program cannot hold; export with group=None")
    if reference.result_dtype(students, teachers) == torch.float64:
        students, teachers = [s.double() for s in students], [t.double() for t in teachers]
    given = (list(students), list(teachers), list(masks), weights, eps, skip_constant, instance)
    loss, losses, _ = torch.ops.jdkd.pearson_exported(*given)
    return loss, losses.detach()


def _forward(
    students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], weights: Sequence[float], eps: float,
    skip_constant: bool, instance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    settings = Settings(tuple(weights), eps, skip_constant, instance)
    students, teachers = _dense(students, teachers)
    return pearson._forward(settings, students, teachers, masks)[:3]


def _forward_fake(
    students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], weights: Sequence[float], eps: float,
    skip_constant: bool, instance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = reference.result_dtype(students, teachers)
    channels = sum(s.shape[1] * (s.shape[0] if instance else 1) for s in students)
    new = students[0].new_empty
    sizes = (), (len(students),), (2, reference.ROWS, channels)
    loss, losses, table = (new(size, dtype=dtype) for size in sizes)
    return loss, losses, table


def _dense(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [pearson._same_layout(s, t) for s, t in zip(students, teachers, strict=True)]
    return [s for s, _ in pairs], [t for _, t in pairs]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    students, teachers, masks, *_, ctx.instance = inputs
    ctx.levels = len(students)
    ctx.save_for_backward(output[2], *students, *teachers, *masks)


def _gradients(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    pearson.refuse_second_derivative()
    table, *tensors = ctx.saved_tensors
    students, teachers, masks = (tensors[i * ctx.levels : (i + 1) * ctx.levels] for i in range(3))
    students, teachers = _dense(students, teachers)
    sides = []
    for place, (x, y) in enumerate(((students, teachers), (teachers, students))):
        needed = ctx.needs_input_grad[place]
        sides.append([None] * ctx.levels)
        if any(needed):
            dx = pearson._gradient(dloss, x, y, table[place], [None] * ctx.levels, masks, ctx.instance)
            sides[-1] = [d if wanted else None for d, wanted in zip(dx, needed, strict=True)]
    return *sides, [None] * len(masks), None, None, None, None


_library = torch.library.Library("jdkd", "FRAGMENT")
_library.define(
    "pearson_exported(Tensor[] students, Tensor[] teachers, Tensor[] masks, float[] weights, float eps, "
    "bool skip_constant, bool instance) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("pearson_exported", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::pearson_exported", _forward_fake, lib=_library)
torch.library.register_autograd("jdkd::pearson_exported", _gradients, setup_context=_save, lib=_library)
