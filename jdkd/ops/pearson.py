"""The Pearson distillation loss over all levels: two opaque operators and the autograd rule around them.

The forward returns the loss and a table of five scalars a channel; the backward reads both sides once more.
Nothing of the size of a feature is kept besides the features themselves. The formulas are in
:mod:`jdkd.reference.pearson`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.reference import pearson as reference
from jdkd.reference.pearson import Features, match_size

_OP = "pearson"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
for _name in ("cuda", "triton", "cpu"):
    _backend.register(_OP, _name, dtypes=_DTYPES)
_backend.register(_OP, "reference")

_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def pkd_loss(student: Features, teacher: Features, loss_weight: float = 1.0, resize_stu: bool = True) -> Tensor:
    """Pearson distillation loss (PKD): a mean squared error between features standardised channel by channel.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022, with the numbers of the authors' implementation: statistics over batch and
    positions, unbiased standard deviation plus 1e-6, half the mean squared error, summed over levels. For
    two features with correlation ``r`` in every channel it is ``1 - r``, whatever their scales and offsets.
    Computed in float32 whatever the dtype.

    A channel of one element (batch 1, a 1x1 map) adds 0. A constant channel of the student adds about 0.5
    and, as in the public loss, a gradient about a million times that of a live one. Differentiating with
    ``create_graph=True`` is refused.

    Args:
        student: one level ``[N, C, H, W]``, or an iterable of levels (list, tuple, dict, generator).
        teacher: as many levels, with the same batch and channels, on the same device. Dtypes may differ.
            Levels that need a gradient get one.
        loss_weight: factor of the loss; the authors use 6 for two-stage detectors and 10 for dense ones.
        resize_stu: where sizes differ, resize the student's level to the teacher's (True) or the reverse
            (False), bilinearly. Levels are paired in the order given.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        InputError: if numbers of levels, batches, channels or devices differ, or a level is not a floating
            ``[N, C, H, W]`` with elements.
    """
    students, teachers = _levels(student, "student"), _levels(teacher, "teacher")
    if len(students) != len(teachers):
        raise InputError(
            f"student has {len(students)} levels and teacher has {len(teachers)}; pass the levels that pair up"
        )
    if not students:
        raise InputError("student and teacher have no levels; pass at least one feature [N, C, H, W]")
    pairs = []
    for index, (s, t) in enumerate(zip(students, teachers, strict=True)):
        _check_pair(index, s, t)
        pairs.append(match_size(s, t, resize_stu))
    return pearson_loss([s for s, _ in pairs], [t for _, t in pairs], loss_weight)


def _levels(features: Features, name: str) -> list[Tensor]:
    if isinstance(features, Tensor):
        return [features]
    levels = list(features.values() if isinstance(features, Mapping) else features)
    for index, level in enumerate(levels):
        if not isinstance(level, Tensor):
            raise InputError(f"{name} level {index} is a {type(level).__name__}; pass tensors [N, C, H, W]")
    return levels


def _check_pair(index: int, student: Tensor, teacher: Tensor) -> None:
    for name, level in (("student", student), ("teacher", teacher)):
        if level.dim() != 4 or level.numel() == 0 or not torch.is_floating_point(level):
            raise InputError(
                f"{name} level {index} has shape {tuple(level.shape)} and dtype {level.dtype}; "
                "it must be a floating [N, C, H, W] with elements"
            )
    for what, axis, remedy in (
        ("images", 0, "run both networks on the same batch"),
        ("channels", 1, "select or project channels first"),
    ):
        if student.shape[axis] != teacher.shape[axis]:
            raise InputError(
                f"level {index}: student has {student.shape[axis]} {what} and teacher has "
                f"{teacher.shape[axis]}; {remedy}"
            )
    if student.device != teacher.device:
        raise InputError(
            f"level {index}: student is on {student.device} and teacher on {teacher.device}; "
            "move one to the other's device"
        )


def pearson_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], loss_weight: float = 1.0) -> Tensor:
    """Pearson distillation loss of levels whose shapes agree pairwise; see :func:`pkd_loss`.

    Args:
        students: levels ``[N, C, H, W]`` of a floating dtype.
        teachers: levels of the same shapes.
        loss_weight: factor of the loss.

    Returns:
        Scalar, float32 (float64 if a level is).
    """
    pairs = [_same_layout(s, t) for s, t in zip(students, teachers, strict=True)]
    dtype = reference.result_dtype(students, teachers)
    if dtype == torch.float64:
        pairs = [(s.double(), t.double()) for s, t in pairs]
    students, teachers = [s for s, _ in pairs], [t for _, t in pairs]
    if torch.is_grad_enabled() and any(level.requires_grad for level in (*students, *teachers)):
        return _PearsonLoss.apply(loss_weight, len(pairs), *students, *teachers)
    return torch.ops.jdkd.pearson_fwd(students, teachers, loss_weight)[0]


def _same_layout(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both levels dense in the student's layout, copied only if they are not so already."""
    layout = torch.contiguous_format
    if not student.is_contiguous() and student.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return student.contiguous(memory_format=layout), teacher.contiguous(memory_format=layout)


class _PearsonLoss(torch.autograd.Function):
    """Gradients for whichever side asks; what the backward saves is readable by every backend."""

    @staticmethod
    def forward(ctx: Any, loss_weight: float, levels: int, *features: Tensor) -> Tensor:
        students, teachers = list(features[:levels]), list(features[levels:])
        loss, table = torch.ops.jdkd.pearson_fwd(students, teachers, loss_weight)
        # save_for_backward refuses what was made under inference_mode, as teachers often are.
        ctx.kept = [t if _made_in_inference(t) else None for t in teachers]
        ctx.save_for_backward(table, *students, *(t for t in teachers if not _made_in_inference(t)))
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "the Pearson loss was differentiated with create_graph=True, but its gradient has no derivative; "
                "use jdkd.reference.pearson.pkd_loss there"
            )
        table, *saved = ctx.saved_tensors
        levels = len(ctx.kept)
        students, saved_teachers = saved[:levels], iter(saved[levels:])
        teachers = [next(saved_teachers) if kept is None else kept for kept in ctx.kept]
        needs = ctx.needs_input_grad[2:]
        sides = ((students, teachers, needs[:levels]), (teachers, students, needs[levels:]))
        gradients: list[Tensor | None] = [None, None]
        for side, (x, y, needed) in enumerate(sides):
            if any(needed):
                dx = torch.ops.jdkd.pearson_bwd(dloss, x, y, table[side])
                gradients += [d if wanted else None for d, wanted in zip(dx, needed, strict=True)]
            else:
                gradients += [None] * levels
        return tuple(gradients)


def _made_in_inference(level: Tensor) -> bool:
    # The compiler cannot trace the question, and keeps what a backward needs in its own way.
    return not torch.compiler.is_compiling() and level.is_inference()


def _cpu_fwd(students: list[Tensor], teachers: list[Tensor], loss_weight: float) -> tuple[Tensor, Tensor]:
    return torch.ops.jdkd_C.pearson_fwd(students, teachers, loss_weight)


def _cpu_bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    return torch.ops.jdkd_C.pearson_bwd(dloss, x, y, coefficients)


def _of_one_dtype(x: list[Tensor], y: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The CUDA kernels take one dtype; where there are several, float32 holds them all."""
    if all(level.dtype == x[0].dtype for level in (*x, *y)):
        return x, y
    return [level.float() for level in x], [level.float() for level in y]


def _cuda_fwd(students: list[Tensor], teachers: list[Tensor], loss_weight: float) -> tuple[Tensor, Tensor]:
    return torch.ops.jdkd_C.pearson_fwd(*_of_one_dtype(students, teachers), loss_weight)


def _cuda_bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    gradients = torch.ops.jdkd_C.pearson_bwd(dloss, *_of_one_dtype(x, y), coefficients)
    return [gradient.to(level.dtype) for gradient, level in zip(gradients, x, strict=True)]


def _triton_fwd(students: list[Tensor], teachers: list[Tensor], loss_weight: float) -> tuple[Tensor, Tensor]:
    from jdkd.kernels import pearson

    return pearson.pearson_fwd(students, teachers, loss_weight)


def _triton_bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    from jdkd.kernels import pearson

    return pearson.pearson_bwd(dloss, x, y, coefficients)


_FORWARD = {
    "cuda": _cuda_fwd,
    "triton": _triton_fwd,
    "cpu": _cpu_fwd,
    "reference": reference.pearson_fwd,
}
_BACKWARD = {
    "cuda": _cuda_bwd,
    "triton": _triton_bwd,
    "cpu": _cpu_bwd,
    "reference": reference.pearson_bwd,
}


def _check_dense(levels: Sequence[Tensor]) -> None:
    for level in levels:
        if not any(level.is_contiguous(memory_format=layout) for layout in _LAYOUTS):
            raise InputError(
                "jdkd::pearson takes levels that are contiguous or channels-last, and one of shape "
                f"{tuple(level.shape)} has strides {level.stride()}; jdkd.functional.pkd_loss copies such"
            )


def _forward(students: list[Tensor], teachers: list[Tensor], loss_weight: float) -> tuple[Tensor, Tensor]:
    _check_dense(students)
    return _FORWARD[_backend.select(_OP, students[0])](students, teachers, loss_weight)


def _backward(dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    _check_dense(x)
    return _BACKWARD[_backend.select(_OP, x[0])](dloss, x, y, coefficients)


def _forward_fake(students: list[Tensor], teachers: list[Tensor], loss_weight: float) -> tuple[Tensor, Tensor]:
    dtype = reference.result_dtype(students, teachers)
    channels = sum(s.shape[1] for s in students)
    new = students[0].new_empty
    return new((), dtype=dtype), new((2, reference.ROWS, channels), dtype=dtype)


def _backward_fake(dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    return [torch.empty_like(level) for level in x]


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define("pearson_fwd(Tensor[] students, Tensor[] teachers, float loss_weight) -> (Tensor, Tensor)", tags=_TAGS)
_library.define("pearson_bwd(Tensor dloss, Tensor[] x, Tensor[] y, Tensor coefficients) -> Tensor[]", tags=_TAGS)
_library.impl("pearson_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("pearson_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::pearson_fwd", _forward_fake, lib=_library)
torch.library.register_fake("jdkd::pearson_bwd", _backward_fake, lib=_library)
