"""Pyramid levels of two detectors, paired by stride."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

from torch import Tensor

from jdkd.distill.channels import TeacherChannels
from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.ops.pearson_strides import Size, pairs_of, strides_of

EVERY = TeacherChannels(None)
POOLED = "pool"  # torchvision's name for the level that is a sub-sampled copy of the one before


class LevelPair(NamedTuple):
    """Two levels of one stride.

    Args:
        stride: in pixels.
        student, teacher: ``[N, C, H, W]``.
        name: of the student's.
    """

    stride: int
    student: Tensor
    teacher: Tensor
    name: str


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
    channels: TeacherChannels | None = EVERY,
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
        channels: the teacher's that stand opposite the student's; they are picked. None: the widths may differ.

    Raises:
        InputError: nothing matches, a stride asked for is missing, or the channels do not fit.
    """
    ours = _strided(student, size, "student")
    theirs = _strided(teacher, teacher_size or size, "teacher")
    pairs = pairs_of([stride for stride, _ in ours], [stride for stride, _ in theirs])
    common = list(dict.fromkeys(ours[i][0] for i, _ in pairs))
    wanted = common if levels is None else list(levels)
    if not wanted or not set(wanted) <= set(common):
        asked = "" if levels is None else f", and levels asks for {list(levels)}"
        strides = [[stride for stride, _ in side] for side in (ours, theirs)]
        raise InputError(
            f"the student has levels of stride {strides[0]} and the teacher of stride "
            f"{strides[1]}{asked}; take a teacher that shares strides with the student, and levels that "
            "both have."
        )
    if levels is None:
        for who, other, side, paired in (
            ("student", "teacher", ours, [i for i, _ in pairs]),
            ("teacher", "student", theirs, [j for _, j in pairs]),
        ):
            alone = [stride for index, (stride, _) in enumerate(side) if index not in paired]
            if alone:
                say_once(
                    f"the {who}'s levels of stride {alone} are not compared, since the {other} has no level of "
                    "that stride left to pair with"
                )
    chosen = [(*ours[i], theirs[j][1]) for stride in wanted for i, j in pairs if ours[i][0] == stride]
    found = [LevelPair(stride, student[name], teacher[other], name) for stride, name, other in chosen]
    if channels is None:
        return found
    return [
        pair._replace(teacher=channels.select(pair.teacher, pair.student.shape[1], pair.stride, pair.name, [*student]))
        for pair in found
    ]


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
            f"levels is {given or levels!r:.60}; give the strides of the levels to compare, once each, such as "
            "[8, 16, 32]"
        )
    return tuple(map(int, given))


def _strided(pyramid: Mapping[str, Tensor], size: Size, who: str) -> list[tuple[int, str]]:
    """Stride and name of the levels, finest first."""
    strides = level_strides(pyramid, size, who)
    kept = [(strides[name], name) for name in pyramid if name.rpartition(".")[2] != POOLED]
    return sorted(kept, key=lambda entry: entry[0])


def _fits(level: Size, image: Size) -> bool:
    """Whether a level has one stride, a power of two, in both directions."""
    steps = (2**k for k in range(max(image).bit_length() + 1))
    return any(all(i // step <= side <= -(-i // step) for side, i in zip(level, image, strict=True)) for step in steps)
