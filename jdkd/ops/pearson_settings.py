"""What the Pearson loss is asked to compute, checked: weights, masks, statistics, processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.errors import InputError
from jdkd.ops.pearson import Settings
from jdkd.reference.pearson import EPS

_CHOICES = {"zero_variance": ("keep", "skip"), "statistics": ("batch", "instance")}


def settings_of(
    count: int,
    level_weights: Sequence[float] | None,
    loss_weight: float,
    statistics: str,
    zero_variance: str,
    group: torch.distributed.ProcessGroup | None,
) -> Settings:
    """The settings of ``count`` pairs of levels; arguments as of :func:`jdkd.functional.pkd_loss`.

    Raises:
        InputError: one of them is not among the choices, or they exclude each other.
    """
    for name, value in (("statistics", statistics), ("zero_variance", zero_variance)):
        if value not in _CHOICES[name]:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(_CHOICES[name])}")
    if group is not None:
        _check_group(group, statistics)
    return Settings(
        weights=_weights(level_weights, count, loss_weight),
        eps=EPS,
        skip_constant=zero_variance == "skip",
        instance=statistics == "instance",
        group=group,
    )


def _check_group(group: torch.distributed.ProcessGroup, statistics: str) -> None:
    if statistics == "instance":
        raise InputError('statistics="instance" takes every image by itself, so group changes nothing; leave it out')
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise InputError(
            f"group is {group!r}; pass a process group that this process is in, such as "
            "torch.distributed.group.WORLD, or None"
        )


def _weights(level_weights: Sequence[float] | None, count: int, loss_weight: float) -> tuple[float, ...]:
    """The factor of every pair."""
    if level_weights is None:
        return (factor_of("loss_weight", loss_weight),) * count
    if isinstance(level_weights, Mapping | str) or not hasattr(level_weights, "__len__"):
        raise InputError(f"level_weights is a {type(level_weights).__name__}; pass a sequence of numbers, one a level")
    if len(level_weights) != count:
        raise InputError(f"level_weights has {len(level_weights)} values for {count} pairs of levels; give one each")
    factor = factor_of("loss_weight", loss_weight)
    return tuple(factor * factor_of("level_weights", weight) for weight in level_weights)


def factor_of(name: str, value: float) -> float:
    """A weight as a number.

    Raises:
        InputError: it is no finite number, is negative, or wants a gradient.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise InputError(f"{name} is a tensor that requires a gradient, and gets none; multiply the loss by it instead")
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"{name} is or holds {value!r}; it must be a finite number, 0 or more")
    return number


def check_resize(resize_stu: bool) -> None:
    """Raises InputError unless it is True or False."""
    if isinstance(resize_stu, str) or resize_stu not in (True, False):
        raise InputError(f"resize_stu is {resize_stu!r}; give True, to resize the student's levels, or False")


def indices_of(levels: Sequence[int] | None) -> list[int] | None:
    """Indices of levels as ints.

    Raises:
        InputError: they are no list of integers.
    """
    if levels is None:
        return None
    if isinstance(levels, str | Mapping) or not isinstance(levels, Iterable):
        raise InputError(
            f"levels is {levels!r}; give indices of the student's levels in a list, [0, 1], or None for all"
        )
    found = [index.tolist() if hasattr(index, "tolist") else index for index in levels]  # numpy's and torch's
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"levels holds {index!r}; name some of the student's levels by their indices, as ints")
    return found


def masks_of(mask: Tensor | Sequence[Tensor] | None, students: Sequence[Tensor]) -> list[Tensor]:
    """A mask for every level, bool ``[N, 1, H, W]``; empty for None.

    Args:
        mask: bool ``[N, height, width]``, True where the image is, False where it was padded, in pixels or at any
            other resolution; or one such per level.
        students: levels ``[N, C, H, W]``.

    Raises:
        InputError: a mask is not bool, not for as many images, or elsewhere than its level.
    """
    if mask is None:
        return []
    if not isinstance(mask, Tensor | list | tuple):
        raise InputError(f"mask is a {type(mask).__name__}; pass a bool tensor [N, H, W], True where the image is")
    masks = [mask] * len(students) if isinstance(mask, Tensor) else list(mask)
    if len(masks) != len(students):
        raise InputError(f"mask has {len(masks)} entries for {len(students)} pairs of levels; give one each")
    resized = []
    for index, (own, student) in enumerate(zip(masks, students, strict=True)):
        _check_mask(index, own, student)
        if own.shape[1:] == student.shape[2:]:
            resized.append(own[:, None])
        else:
            resized.append(F.interpolate(own[:, None].to(torch.uint8), student.shape[2:], mode="nearest").bool())
    return resized


def _check_mask(index: int, mask: Tensor, student: Tensor) -> None:
    wanted = f"it must be a bool [{student.shape[0]}, H, W] on {student.device}, True where the image is"
    if not isinstance(mask, Tensor):
        raise InputError(f"mask of level {index} is a {type(mask).__name__}; {wanted}")
    fits = mask.dtype == torch.bool and mask.dim() == 3 and mask.shape[0] == student.shape[0] and mask.numel() > 0
    if not fits or mask.device != student.device:
        raise InputError(
            f"mask of level {index} has shape {tuple(mask.shape)} and dtype {mask.dtype} on {mask.device}; {wanted}"
        )
