"""Pyramid levels of two detectors, paired by stride."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.ops.pearson_strides import Size, pairs_of, strides_of

POOLED = "pool"  # torchvision's name for the level that is a sub-sampled copy of the one before


class LevelPair(NamedTuple):
    """Two levels of one stride.

    Args:
        stride: in pixels.
        student, teacher: ``[N, C, H, W]``.
    """

    stride: int
    student: Tensor
    teacher: Tensor


def level_strides(pyramid: Mapping[str, Tensor], size: Size, who: str) -> dict[str, int]:
    """Name -> stride of the levels (``[N, C, H, W]``) of a batch of ``size``, see :func:`strides_of`.

    Raises:
        InputError: a level is larger than the images, or its channels come last.
    """
    for name, level in pyramid.items():
        shape = tuple(level.shape)
        if not _fits(shape[2:], size) and _fits(shape[1:3], size):
            raise InputError(
                f"the {who}'s level {name} is {list(shape)} for images of {size[0]}x{size[1]}, and looks like "
                "[N, H, W, C]; let its neck return [N, C, H, W] (level.permute(0, 3, 1, 2))"
            )
    sizes = [tuple(level.shape[2:]) for level in pyramid.values()]
    return dict(zip(pyramid, strides_of(sizes, size, f"the {who}"), strict=True))


def pair_levels(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    size: Size,
    levels: Sequence[int] | None = None,
    *,
    teacher_size: Size | None = None,
) -> list[LevelPair]:
    """Pairs the levels of two pyramids that have the same stride, finest first or in the order asked for.

    Pairing by index, as the published configurations do, compares P2 of a two-stage teacher with P3 of a
    one-stage student; the stride never lies. Several levels of one stride are paired in their order. A level that is
    left out unasked is named once in a notice.

    Args:
        student, teacher: pyramids, name -> ``[N, C, H, W]``.
        size: height and width in pixels of the batch that both saw.
        levels: the strides wanted; by default all that both have. The pooled level on top of torchvision's
            pyramids is left out, as it holds nothing that the level before it does not.
        teacher_size: height and width of the batch that the teacher saw, where it is another.

    Raises:
        InputError: nothing matches, or a stride asked for is missing.
    """
    ours = _strided(student, size, "student")
    theirs = _strided(teacher, teacher_size or size, "teacher")
    pairs = pairs_of([stride for stride, _ in ours], [stride for stride, _ in theirs])
    found = [LevelPair(ours[i][0], ours[i][1], theirs[j][1]) for i, j in pairs]
    wanted = list(dict.fromkeys(pair.stride for pair in found)) if levels is None else list(levels)
    if not wanted or not set(wanted) <= {pair.stride for pair in found}:
        asked = "" if levels is None else f", and levels asks for {list(levels)}"
        strides = [[stride for stride, _ in side] for side in (ours, theirs)]
        raise InputError(
            f"the student has levels of stride {strides[0]} and the teacher of stride "
            f"{strides[1]}{asked}; take a teacher that shares strides with the student, and levels that "
            "both have."
        )
    if levels is None:
        for who, side, paired in (("student", ours, [i for i, _ in pairs]), ("teacher", theirs, [j for _, j in pairs])):
            alone = [stride for index, (stride, _) in enumerate(side) if index not in paired]
            if alone:
                say_once(
                    f"the {who}'s levels of stride {alone} are not distilled: the other side has no more levels of "
                    "that stride"
                )
    return [pair for stride in wanted for pair in found if pair.stride == stride]


def select_channels(pair: LevelPair, channels: Tensor | None) -> Tensor:
    """The teacher's channels (of ``[N, C_t, H, W]``) opposite the student's: ``[N, C_s, H, W]``.

    Args:
        pair: two levels.
        channels: ``[C_s]``, see :func:`as_index`.

    Raises:
        InputError: the counts differ and ``channels`` does not make up for it, or it names a channel that is not there.
    """
    stride, student, teacher = pair
    picked = teacher.shape[1] if channels is None else len(channels)
    if picked != student.shape[1]:
        what = "" if channels is None else f", of which channels picks {picked}"
        raise InputError(
            f"the student's pyramid has {student.shape[1]} channels and the teacher's "
            f"{teacher.shape[1]}{what} (level of stride {stride}); give channels, the teacher's index for each of the "
            "student's."
        )
    return teacher if channels is None else teacher.index_select(1, channels)


def as_index(channels: Tensor | Sequence[int] | None) -> Tensor | None:
    """``channels`` as an int64 tensor ``[C_s]``.

    Raises:
        InputError: they are no indices, or one stands there twice.
    """
    if channels is None:
        return None
    try:
        ordered = not isinstance(channels, Mapping | Set | str)
        index = torch.as_tensor(channels if isinstance(channels, Tensor) else list(channels) if ordered else [])
    except (TypeError, ValueError, RuntimeError):
        index = torch.zeros(0)
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    if index.dim() != 1 or len(index) == 0 or not whole or index.min() < 0:
        raise InputError(
            f"channels is {_short(channels)}; give the index, from 0, of the teacher's channel for each of the "
            "student's, a list of integers"
        )
    values, counts = index.unique(return_counts=True)
    if counts.max() > 1:
        raise InputError(f"channels names channel {values[counts.argmax()].item()} more than once; give each once")
    return index.to(torch.int64)


def check_index(channels: Tensor | None, pairs: Sequence[LevelPair]) -> None:
    """Refuses ``channels`` beyond a teacher's.

    Raises:
        InputError: one is not there.
    """
    if channels is None:
        return
    most = int(channels.max())
    for stride, _, teacher in pairs:
        if most >= teacher.shape[1]:
            raise InputError(
                f"channels names channel {most} and the teacher's level of stride {stride} has {teacher.shape[1]}; "
                "give indices of channels that it has"
            )


def as_strides(levels: Iterable[int] | None) -> tuple[int, ...] | None:
    """The strides asked for.

    Raises:
        InputError: they are no strides, or one stands there twice.
    """
    if levels is None:
        return None
    given = [] if isinstance(levels, str | bytes) or not isinstance(levels, Iterable) else list(levels)
    whole = all(isinstance(stride, Integral) and not isinstance(stride, bool) and stride > 0 for stride in given)
    if not given or not whole or len(set(given)) < len(given):
        raise InputError(
            f"levels is {_short(given or levels)}; give the strides of the levels to compare, once each, such as "
            "[8, 16, 32]"
        )
    return tuple(map(int, given))


def _strided(pyramid: Mapping[str, Tensor], size: Size, who: str) -> list[tuple[int, Tensor]]:
    """Stride and level, finest first."""
    strides = level_strides(pyramid, size, who)
    kept = [(strides[name], level) for name, level in pyramid.items() if name.rpartition(".")[2] != POOLED]
    return sorted(kept, key=lambda entry: entry[0])


def _fits(level: Size, image: Size) -> bool:
    """Whether a level has one stride, a power of two, in both directions."""
    steps = (2**k for k in range(max(image).bit_length() + 1))
    return any(all(i // step <= side <= -(-i // step) for side, i in zip(level, image, strict=True)) for step in steps)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
