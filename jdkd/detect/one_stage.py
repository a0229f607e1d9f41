"""What the heads have in common that classify every place of a pyramid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder

from jdkd.detect.norms import group_norm

PRIOR = 0.01  # what a focal loss's classifier says at first (Lin et al., ICCV 2017, section 4.1)


class BoxSides(BoxLinearCoder):
    """How far the sides of a box lie from a place, in sizes of its anchor; by both names that torchvision has."""

    def decode_single(self, distances: Tensor, anchors: Tensor) -> Tensor:
        return self.decode(distances, anchors)


def tower(channels: int, depth: int) -> nn.Sequential:
    """Convolutions with group norms, as FCOS has them before its predictions."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
        layers += [conv, group_norm(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def flat(found: Tensor) -> Tensor:
    """A map's values place by place: ``[N, K, H, W]`` to ``[N, HW, K]``."""
    return found.flatten(2).transpose(1, 2)


def at_least_single(output: Tensor) -> Tensor:
    """In fp32 where it was in half precision, whose steps are coarser than pixels."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
