"""Pyramid levels of two detectors, paired by stride."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jdkd.errors import InputError

POOLED = "pool"  # torchvision's name for the level that is a sub-sampled copy of the one before


def stride_of(feature: Tensor, size: tuple[int, int]) -> int:
    """The stride of a level (``[N, C, H, W]``) for an input of ``size`` (height, width): a power of two."""
    height, width = feature.shape[-2:]
    return 2 ** round(math.log2(max(size) / max(height, width)))


def pair_levels(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    size: tuple[int, int],
    levels: Sequence[int] | None = None,
    *,
    teacher_size: tuple[int, int] | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Pairs the levels of two pyramids that have the same stride, finest first or in the order asked for.

    Pairing by index, as the published configurations do, compares P2 of a two-stage teacher with P3 of a
    one-stage student; the stride never lies.

    Args:
        student, teacher: pyramids, name -> ``[N, C, H, W]``.
        size: height and width in pixels of the batch that both saw.
        levels: the strides wanted; by default all that both have. The pooled level on top of torchvision's
            pyramids is left out, as it holds nothing that the level before it does not.
        teacher_size: height and width of the batch that the teacher saw, where it is another.

    Returns:
        stride -> (student level, teacher level).

    Raises:
        InputError: nothing matches, or a stride asked for is missing.
    """
    ours, theirs = _by_stride(student, size), _by_stride(teacher, teacher_size or size)
    common = sorted(ours.keys() & theirs.keys())
    wanted = common if levels is None else list(levels)
    if not wanted or not set(wanted) <= set(common):
        asked = "" if levels is None else f", and levels asks for {list(levels)}"
        raise InputError(
            f"the student has levels of stride {sorted(ours)} and the teacher of stride "
            f"{sorted(theirs)}{asked}; take a teacher that shares strides with the student, and levels that "
            "both have."
        )
    return {stride: (ours[stride], theirs[stride]) for stride in wanted}


def select_channels(teacher: Tensor, student: Tensor, channels: Tensor | None) -> Tensor:
    """The teacher's channels (of ``[N, C_t, H, W]``) opposite the student's: ``[N, C_s, H, W]``.

    Raises:
        InputError: the counts differ and ``channels`` does not make up for it.
    """
    chosen = teacher if channels is None else teacher.index_select(1, channels)
    if chosen.shape[1] != student.shape[1]:
        what = "" if channels is None else f", of which channels picks {chosen.shape[1]}"
        raise InputError(
            f"the student's pyramid has {student.shape[1]} channels and the teacher's "
            f"{teacher.shape[1]}{what}; give channels, the teacher's index for each of the student's."
        )
    return chosen


def as_index(channels: Tensor | Sequence[int] | None) -> Tensor | None:
    """``channels`` as an int64 tensor ``[C_s]``."""
    return None if channels is None else torch.as_tensor(channels, dtype=torch.int64)


def _by_stride(pyramid: Mapping[str, Tensor], size: tuple[int, int]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for name, feature in pyramid.items():
        if name != POOLED:
            found.setdefault(stride_of(feature, size), feature)
    return found
