"""Where a tensor holds channels: arrays of channel numbers that broadcast against it.

A *label* has as many dimensions as its tensor; along those that its channels run it has the tensor's size, along all
others 1. A feature map ``[N, C, H, W]`` has one label ``[1, C, 1, 1]``, a weight ``[O, I, 3, 3]`` one for each of its
dimensions. A *layout* is a tensor's labels, no two along the same dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Label = np.ndarray
Layout = tuple[Label, ...]

LARGEST = 1 << 21  # numbers of a label; what a view would repeat more often ends here


def span(label: Label) -> frozenset[int]:
    """Returns: the dimensions that a label's channels run along."""
    return frozenset(dim for dim, size in enumerate(label.shape) if size > 1)


def fits(label: Label, shape: Sequence[int]) -> bool:
    """Whether a label can be one of a tensor of this shape."""
    return label.ndim == len(shape) and all(size in (1, full) for size, full in zip(label.shape, shape, strict=True))


def along(numbers: np.ndarray, dim: int, ndim: int) -> Label:
    """The label of channels ``[C]`` that run along one dimension of a tensor."""
    return numbers.reshape([-1 if place == dim else 1 for place in range(ndim)])


def condensed(label: Label) -> Label:
    """The label without the dimensions along which nothing changes."""
    for dim in span(label):
        first = label.take([0], axis=dim)
        if (label == first).all():
            label = first
    return label


def reshaped(label: Label, old: Sequence[int], new: Sequence[int]) -> Label | None:
    """The label after a view of its tensor from shape ``old`` to shape ``new``.

    Of an empty tensor a dimension is followed as if it had what the other shape says.

    Returns:
        None where it would be too large, or where a tensor without elements leaves open what became of its channels.
    """
    shape = new
    old, new = _filled(old, new)
    if math.prod(old) != math.prod(new):
        return None
    full, target = [], []
    for here, there in _blocks(old, new):
        touched = any(label.shape[dim] > 1 for dim in here)
        full += [old[dim] if touched else 1 for dim in here]
        target += [new[dim] if touched else 1 for dim in there]
    if math.prod(full) > LARGEST or math.prod(full) != math.prod(target):
        return None
    moved = condensed(np.broadcast_to(label, full).reshape(target))
    return moved if fits(moved, shape) else None


def _filled(old: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two shapes without zeros, of equally many elements."""
    sides = [[size or 1 for size in shape] for shape in (old, new)]
    counts = [math.prod(side) for side in sides]
    for side, shape, missing in zip(sides, (old, new), (counts[1], counts[0]), strict=True):
        if missing > math.prod(side) and missing % math.prod(side) == 0 and 0 in shape:
            side[list(shape).index(0)] = missing // math.prod(side)
    return sides[0], sides[1]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cuts two shapes of equally many elements into the shortest runs of dimensions that hold equally many."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        here, there = [], []
        left = right = 1
        while True:
            if left <= right and i < len(old) and (left < right or not here):
                left *= old[i]
                here.append(i)
                i += 1
            elif j < len(new) and (right < left or not there):
                right *= new[j]
                there.append(j)
                j += 1
            else:
                break
            if left == right and here and there:
                break
        blocks.append((here, there))
    return blocks
