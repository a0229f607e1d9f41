"""The strides of a pyramid's levels, told by their sizes: the one rule by which levels are paired."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jdkd.errors import InputError

Size = tuple[int, int]  # height, width


def strides_of(sizes: Sequence[Size], image: Size, who: str = "the pyramid") -> list[int]:
    """The stride of every level, a power of two.

    The finest level is measured against the image, every other one against the next finer level: strides double from
    level to level, and a level that is halved again has a size that was rounded down or up. So P7 of an image of 160
    pixels, 2x2, has stride 128 (after P6, 3x3), which its size alone would not tell. Levels of one size have one
    stride, save for those of 1x1, that halving leaves 1x1.

    Args:
        sizes: height and width of the levels, in any order.
        image: height and width of the images, or of a level finer than all, for strides relative to that one.
        who: what errors call the pyramid.

    Returns:
        A stride a level, in the order of ``sizes``.

    Raises:
        InputError: a level is larger than the image.
    """
    strides, finer, stride = [0] * len(sizes), image, 1
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i][0] * sizes[i][1])):
        size = sizes[index]
        if size[0] > image[0] + 1 or size[1] > image[1] + 1:
            raise InputError(
                f"{who} has a level of {size[0]}x{size[1]} for images or a finest level of {image[0]}x{image[1]}, a "
                "stride below 1; give levels [N, C, H, W], permuted to that if they are channels last"
            )
        stride *= _finest(size, image) if place == 0 else _step(size, finer)
        strides[index], finer = stride, size
    return strides


def pairs_of(students: Sequence[int], teachers: Sequence[int]) -> list[tuple[int, int]]:
    """Indices of levels of equal strides; where several have one, the first stands opposite the first, and so on."""
    free = list(range(len(teachers)))
    pairs = []
    for index, stride in enumerate(students):
        opposite = next((other for other in free if teachers[other] == stride), None)
        if opposite is not None:
            free.remove(opposite)
            pairs.append((index, opposite))
    return pairs


def _finest(size: Size, image: Size) -> int:
    """The stride of a level with nothing finer beside it; padded convolutions round up, so that is tried first."""
    steps = [2**k for k in range(max(image).bit_length() + 1)]
    up = (step for step in steps if all(side == -(-whole // step) for side, whole in zip(size, image, strict=True)))
    rounded = (step for step in steps if _is_rounded(size, image, step))
    return next(up, None) or next(rounded, None) or _nearest(size, image)


def _step(size: Size, finer: Size) -> int:
    """By how much the stride grows from the next finer level: the least power of two that explains the sizes."""
    if size == finer and size != (1, 1):
        return 1
    steps = (2**k for k in range(1, max(finer).bit_length() + 1))
    return next((step for step in steps if _is_rounded(size, finer, step)), None) or _nearest(size, finer)


def _is_rounded(size: Size, whole: Size, step: int) -> bool:
    """Whether ``whole / step``, rounded down or up, is ``size`` in both directions."""
    return all(w // step <= side <= -(-w // step) for side, w in zip(size, whole, strict=True))


def _nearest(size: Size, whole: Size) -> int:
    return 2 ** max(0, round(math.log2(max(whole) / max(size))))
