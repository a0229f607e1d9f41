"""Detectors that are nothing but a pyramid, for pairs that no real detector shows."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pyramid(nn.Module):
    """Average-pools and mixes the image's channels, one level per stride."""

    def __init__(self, channels: int, strides: dict[str, int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(channels, 3, 1, 1, generator=generator))
        self.strides = strides
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return OrderedDict(
            (name, F.conv2d(F.avg_pool2d(x, stride, ceil_mode=True), self.mix)) for name, stride in self.strides.items()
        )


class PyramidDetector(nn.Module):
    def __init__(self, channels: int, strides: dict[str, int], seed: int = 0) -> None:
        super().__init__()
        self.backbone = Pyramid(channels, strides, seed)

    def forward(self, images: list[Tensor]) -> dict[str, Tensor]:
        return self.backbone(torch.stack(images))


def batch(count: int = 2, size: int = 64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.rand(count, 3, size, size, generator=generator))
