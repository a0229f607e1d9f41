"""ATSS: FCOS whose positives are chosen by the statistics of each object (Zhang et al., CVPR 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead
from torchvision.ops import box_iou

from jdkd.detect.norms import group_norm
from jdkd.detect.one_stage import BoxSides, at_least_single, flat, tower

CANDIDATES = 9  # of every level, section 4.3
LARGEST = math.log(1000 / 16)  # of the logarithms of distances, torchvision's bound


def adaptive_assignment(anchors: Tensor, per_level: Sequence[int], boxes: Tensor) -> Tensor:
    """Which object every anchor is trained on (Zhang et al., CVPR 2020, section 4.1, algorithm 1).

    Of every level the anchors whose centres are nearest to an object's are its candidates. Those are its positives
    whose IoU with it is at least the mean of all candidates' plus their standard deviation, and whose centre lies in
    it. An anchor that two objects claim goes to the one with the higher IoU.

    Args:
        anchors: ``[A, 4]`` xyxy in pixels, level after level.
        per_level: how many of them each level has.
        boxes: of the objects, ``[M, 4]`` xyxy in pixels.

    Returns:
        The number of each anchor's object, ``[A]``; -1 for background.
    """
    if len(boxes) == 0:
        return anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2  # [A, 2]
    of_boxes = (boxes[:, :2] + boxes[:, 2:]) / 2  # [M, 2]
    distances = (of_boxes[:, None] - centers).square().sum(2)  # [M, A]
    nearest, first = [], 0
    for of_level in distances.split(list(per_level), dim=1):
        count = min(CANDIDATES, of_level.shape[1])
        nearest.append(of_level.topk(count, dim=1, largest=False).indices + first)
        first += of_level.shape[1]
    nearest = torch.cat(nearest, dim=1)  # [M, C]
    overlaps = box_iou(boxes, anchors)  # [M, A]
    of_candidates = overlaps.gather(1, nearest)
    spread = of_candidates.std(dim=1, correction=min(1, nearest.shape[1] - 1))
    least = (of_candidates.mean(dim=1) + spread)[:, None]
    places = centers[nearest]  # [M, C, 2]
    inside = ((places > boxes[:, None, :2]) & (places < boxes[:, None, 2:])).all(dim=2)
    claims = torch.where((of_candidates >= least) & inside, of_candidates, -1.0)
    best, matched = torch.full_like(overlaps, -1).scatter(1, nearest, claims).max(dim=0)
    return matched.masked_fill(best < 0, -1)


class ATSS(FCOS):
    """The full version of section 4.4: an FCOS with a square anchor at every place, for the assignment alone.

    Objects are regressed from the anchor's centre, in units of its size; losses (focal, GIoU, centre-ness) and
    detection are FCOS's.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        matched = [
            adaptive_assignment(places, num_anchors_per_level, target["boxes"])
            for places, target in zip(anchors, targets, strict=True)
        ]
        return self.head.compute_loss(targets, head_outputs, anchors, matched)


class ATSSHead(FCOSHead):
    """FCOS's head, of which a box at first is the anchor.

    Args:
        channels: of the pyramid, a multiple of 8.
        outputs: classes with label 0, which stands for nothing.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        nn.Module.__init__(self)  # as FCOSHead's own would make norms of 32 groups
        self.box_coder = BoxSides()
        self.classification_head = FCOSClassificationHead(channels, 1, outputs, norm_layer=group_norm)
        self.regression_head = SidesHead(channels)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """``cls_logits`` [N, A, K], ``bbox_regression`` [N, A, 4] and ``bbox_ctrness`` [N, A, 1]."""
        return {name: at_least_single(output) for name, output in super().forward(x).items()}


class SidesHead(nn.Module):
    """Distances to the sides of a box in sizes of the anchor, and the centre-ness.

    Distances are ``exp(x) / 2``: positive as those of Tian et al., ICCV 2019 (section 3.2), which a rectified linear
    unit, torchvision's choice, does not leave where it has once come to zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = tower(channels, 4)
        self.bbox_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.bbox_ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        for layer in (self.bbox_reg, self.bbox_ctrness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:  # [N, C, H, W] each -> [N, A, 4], [N, A, 1]
        features = [self.conv(level) for level in x]
        logs = torch.cat([flat(self.bbox_reg(feature)) for feature in features], dim=1)
        centers = torch.cat([flat(self.bbox_ctrness(feature)) for feature in features], dim=1)
        return at_least_single(logs).clamp(max=LARGEST).exp() / 2, centers
