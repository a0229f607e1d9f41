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


class Convolved(nn.Module):
    """Two levels of as many channels as asked for, each a feature of its own of what is in the image."""

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fine = nn.Conv2d(3, width, 5, 4, padding=2, bias=False)
        self.coarse = nn.Conv2d(width, width, 3, 2, padding=1, bias=False)
        self.gain = 1.0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"fine": fine * self.gain, "coarse": self.coarse(fine) * self.gain}


class Detector(nn.Module):
    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.backbone = Convolved(width, seed)

    def forward(self, images: list[Tensor], targets: object = None) -> dict[str, Tensor]:
        levels = self.backbone(torch.stack(images))
        return {"loss_head": sum(level.square().mean() for level in levels.values())}
