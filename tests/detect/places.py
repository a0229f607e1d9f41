"""The one-stage heads that torchvision lacks, over two maps that are made at once."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_convert

from jdkd.detect.atss import ATSS, ATSSHead
from jdkd.detect.gfl import GFL, GFLHead
from jdkd.detect.reppoints import RepPoints, RepPointsHead

KINDS = {"atss": (ATSS, ATSSHead, 3), "gfl": (GFL, GFLHead, 3), "reppoints": (RepPoints, RepPointsHead, 1)}
STRIDES = (8, 16)
SIDE = 64


class Maps(nn.Module):
    """Maps of strides 8 and 16."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, channels, 8, 8), nn.Conv2d(channels, channels, 2, 2)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x).relu()
        return OrderedDict([("0", first), ("1", self.second(first).relu())])


def small(kind: str, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model, head, scale = KINDS[kind]
    anchors = AnchorGenerator(tuple((scale * stride,) for stride in STRIDES), ((1.0,),) * 2)
    given = {"anchor_generator": anchors, "head": head(16, outputs), "score_thresh": 0.05}
    return model(Maps(), outputs, min_size=SIDE, max_size=SIDE, **given)


def places(scale: int = 3, strides: tuple[int, ...] = STRIDES) -> tuple[Tensor, list[int]]:
    """Square anchors as torchvision lays them over an image of 64x64, and how many each level has."""
    levels = []
    for stride in strides:
        steps = torch.arange(0.0, SIDE, stride)
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        reach = scale * stride / 2
        levels.append(torch.stack((x - reach, y - reach, x + reach, y + reach), dim=-1).reshape(-1, 4))
    return torch.cat(levels), [len(level) for level in levels]


def drawn_boxes(count: int, generator: torch.Generator, smallest: float = 2.0, largest: float = 50.0) -> Tensor:
    centers = SIDE * torch.rand(count, 2, generator=generator)
    sizes = smallest + (largest - smallest) * torch.rand(count, 2, generator=generator)
    return box_convert(torch.cat((centers, sizes), dim=1), "cxcywh", "xyxy")


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def iou(a: list[float], b: list[float]) -> float:
    """Of two boxes, in plain numbers."""
    common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common)


def giou_loss(a: list[float], b: list[float]) -> float:
    """One minus the generalised IoU (Rezatofighi et al., CVPR 2019)."""
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(areas) / (1 + iou(a, b))
    return 1 - iou(a, b) + (hull - union) / hull
