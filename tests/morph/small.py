"""Small detectors of several families, each with a builder's name, as an architecture wants it."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FrozenBatchNorm2d

from benchmarks import prunable
from jdkd.detect import read
from jdkd.graph import Topology
from jdkd.rewrite import Architecture
from jdkd.rewrite.trial import comparable
from tests.detectors import build, small_spec
from tests.graph.networks import PANDetector
from tests.rewrite.test_torchvision import residual, windows

SIZE = 64, 96


def faster_rcnn() -> nn.Module:
    return build(small_spec("bottleneck"))


def fcos() -> nn.Module:
    """With frozen batch norms in the backbone, and group norms in the head."""
    return prunable.fcos(residual(FrozenBatchNorm2d))


def retinanet() -> nn.Module:
    """Over a transformer."""
    return prunable.retinanet(windows())


class Plain(nn.Module):
    """A backbone without a norm or a residual block."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 24, 64)
        layers = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
        ]  # fmt: skip
        self.features, self.extra = nn.Sequential(*layers), nn.Sequential(nn.Conv2d(64, 16, 3, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.features(x)
        return {"0": first, "1": self.extra(first)}


def ssd() -> nn.Module:
    anchors = DefaultBoxGenerator([[2]] * 2)
    head = SSDHead([64, 16], anchors.num_anchors_per_location(), prunable.CLASSES)
    return SSD(Plain(), anchors, (64, 96), prunable.CLASSES, head=head)


def pan() -> nn.Module:
    return PANDetector()


DETECTORS = {make.__name__: make for make in (faster_rcnn, fcos, retinanet, ssd, pan)}


@cache
def parent(name: str) -> tuple[nn.Module, Topology]:
    """A detector in double precision whose weights hide nothing, with its topology, verified."""
    torch.manual_seed(0)
    model = comparable(DETECTORS[name]().eval(), (picture(),)).model
    model.architecture = Architecture(f"tests.morph.small:{name}")
    return model, read(model, size=SIZE, check=True)


def picture() -> list[Tensor]:
    return [torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))]
