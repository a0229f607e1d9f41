"""Which levels the Pearson loss compares: what callers pass, checked and brought into pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.errors import InputError
from jdkd.reference.pearson import Features

PAIRINGS = ("index", "stride")


def as_levels(features: Features, name: str) -> list[Tensor]:
    """The levels of a tensor, iterable or mapping, each ``[N, C, H, W]``.

    Raises:
        InputError: one is no floating ``[N, C, H, W]`` with elements.
    """
    if isinstance(features, Tensor):
        levels = [features]
    else:
        levels = list(features.values() if isinstance(features, Mapping) else features)
    for index, level in enumerate(levels):
        if not isinstance(level, Tensor):
            raise InputError(f"{name} level {index} is a {type(level).__name__}; pass tensors [N, C, H, W]")
        if level.dim() != 4 or level.numel() == 0 or not torch.is_floating_point(level):
            raise InputError(
                f"{name} level {index} has shape {tuple(level.shape)} and dtype {level.dtype}; "
                "it must be a floating [N, C, H, W] with elements"
            )
    return levels


def paired(
    students: Sequence[Tensor], teachers: Sequence[Tensor], pairing: str, levels: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Which teacher level stands opposite which student level.

    Args:
        students, teachers: levels ``[N, C, H, W]``.
        pairing: ``"index"``, in the order given, or ``"stride"``: levels of the same stride, told by their
            sizes, since both networks saw the same images.
        levels: indices of the student levels wanted; None is all that pair up.

    Returns:
        Pairs of indices, in the order of the student's levels.

    Raises:
        InputError: nothing pairs up, ``levels`` asks for what is not there, or a pair differs in images, channels
            or device.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")
    if pairing == "index" and len(students) != len(teachers):
        raise InputError(
            f"student has {len(students)} levels and teacher has {len(teachers)}; pass the levels that pair up, "
            'or pairing="stride"'
        )
    if not students or not teachers:
        raise InputError("student and teacher have no levels; pass at least one feature [N, C, H, W]")
    opposite = dict(enumerate(range(len(students)))) if pairing == "index" else _by_stride(students, teachers)
    if not opposite:
        raise InputError(
            f"no level of the student, of sizes {_sizes(students)}, has the stride of one of the teacher, of sizes "
            f"{_sizes(teachers)}; run both on images of one size and pass levels that have strides in common"
        )
    if levels is not None:
        if not levels or not set(levels) <= set(opposite):
            raise InputError(f"levels is {list(levels)}; of the student's levels {sorted(opposite)} have a partner")
        opposite = {index: opposite[index] for index in sorted(set(levels))}
    for index, other in opposite.items():
        _check_pair(index, students[index], teachers[other])
    return list(opposite.items())


def _by_stride(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> dict[int, int]:
    """For every student level the teacher level that is closest in size, if it is within a factor of sqrt 2."""
    opposite: dict[int, int] = {}
    for index, student in enumerate(students):
        away = [
            max(abs(math.log2(a / b)) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
            for teacher in teachers
        ]
        closest = min(range(len(teachers)), key=away.__getitem__)
        if away[closest] < 0.5 and closest not in opposite.values():
            opposite[index] = closest
    return opposite


def _sizes(levels: Sequence[Tensor]) -> str:
    return ", ".join(f"{level.shape[2]}x{level.shape[3]}" for level in levels)


def _check_pair(index: int, student: Tensor, teacher: Tensor) -> None:
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


def weights_of(level_weights: Sequence[float] | None, count: int, loss_weight: float) -> tuple[float, ...]:
    """The factor of every pair.

    Raises:
        InputError: there are not as many weights as pairs.
    """
    if level_weights is None:
        return (float(loss_weight),) * count
    if len(level_weights) != count:
        raise InputError(f"level_weights has {len(level_weights)} values for {count} pairs of levels; give one each")
    return tuple(float(loss_weight) * float(weight) for weight in level_weights)


def masks_of(mask: Tensor | Sequence[Tensor] | None, students: Sequence[Tensor]) -> list[Tensor]:
    """A mask for every level, bool ``[N, 1, H, W]``; empty for None.

    Args:
        mask: bool ``[N, height, width]``, True where the image is, False where it was padded, in pixels or at any
            other resolution; or one such per level.
        students: levels ``[N, C, H, W]``.

    Raises:
        InputError: a mask is not bool, or is not for as many images.
    """
    if mask is None:
        return []
    masks = [mask] * len(students) if isinstance(mask, Tensor) else list(mask)
    if len(masks) != len(students):
        raise InputError(f"mask has {len(masks)} entries for {len(students)} pairs of levels; give one each")
    resized = []
    for index, (own, student) in enumerate(zip(masks, students, strict=True)):
        if own.dtype != torch.bool or own.dim() != 3 or own.shape[0] != student.shape[0]:
            raise InputError(
                f"mask of level {index} has shape {tuple(own.shape)} and dtype {own.dtype}; it must be a bool "
                f"[{student.shape[0]}, H, W], True where the image is"
            )
        if own.shape[1:] == student.shape[2:]:
            resized.append(own[:, None])
        else:
            resized.append(F.interpolate(own[:, None].to(torch.uint8), student.shape[2:], mode="nearest").bool())
    return resized
