"""What the tests of packing share: subnets of a few weights, and what their parts must hold, element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdkd.ops.active_channels import Channels, active_channels
from jdkd.ops.pack import Part

LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channels(value: int | Sequence[int], maximum: int) -> Channels:
    return active_channels(value, maximum, "channels")


def weight(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    drawn = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn.contiguous(memory_format=LAST) if last and drawn.dim() == 4 else drawn


def subnet() -> tuple[list[Tensor], list[Part]]:
    """A part of every kind: stem, leading, listed, cropped, depthwise, grouped, linear and a bias."""
    shapes = [
        (16, 3, 7, 7),
        (24, 16, 3, 3),
        (24, 16, 1, 1),
        (20, 24, 5, 5),
        (24, 1, 3, 3),
        (24, 6, 3, 3),
        (10, 24),
        (24,),
    ]
    weights = [weight(shape, seed, last=seed % 2 == 1) for seed, shape in enumerate(shapes)]
    parts = [
        Part(Channels(8), Channels(3)),
        Part(Channels(16), Channels(8)),
        Part(channels([3, 0, 21, 9], 24), channels([15, 2, 4], 16)),
        Part(Channels(7), channels([5, 4, 23], 24), (3, 1)),
        Part(channels([23, 1, 7], 24)),
        Part(Channels(12), None, (1, 3)),
        Part(Channels(10), Channels(16)),
        Part(channels([4, 3, 11], 24)),
    ]
    return weights, parts


def listed(active: Channels | None, maximum: int) -> list[int]:
    if active is None:
        return list(range(maximum))
    return list(range(active.count)) if active.index is None else active.index.tolist()


def active_mask(whole: Tensor, part: Part) -> Tensor:
    """Where a weight is active: bool, of its shape."""
    mask = torch.zeros(whole.shape, dtype=torch.bool)
    rows = listed(part.rows, whole.shape[0])
    if whole.dim() == 1:
        mask[rows] = True
        return mask
    columns = listed(part.columns, whole.shape[1])
    taps = torch.ones(whole.shape[2:], dtype=torch.bool)
    if part.kernel is not None:
        top, left = ((w - k) // 2 for w, k in zip(whole.shape[2:], part.kernel, strict=True))
        taps = torch.zeros_like(taps)
        taps[top : top + part.kernel[0], left : left + part.kernel[1]] = True
    for row in rows:
        for column in columns:
            mask[row, column] = taps
    return mask


def sliced(whole: Tensor, part: Part) -> Tensor:
    """The active part by plain indexing, in the order of the lists."""
    taken = whole[listed(part.rows, whole.shape[0])]
    if whole.dim() > 1:
        taken = taken[:, listed(part.columns, whole.shape[1])]
    if part.kernel is not None:
        top, left = ((w - k) // 2 for w, k in zip(whole.shape[2:], part.kernel, strict=True))
        taken = taken[:, :, top : top + part.kernel[0], left : left + part.kernel[1]]
    return taken


def on(device: str, weights: Sequence[Tensor]) -> list[Tensor]:
    return [whole.to(device) for whole in weights]
