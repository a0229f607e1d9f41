"""GFL: boxes as distributions, scored by how well they fit (Li et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.ops import generalized_box_iou_loss

from jdkd.detect.atss import ATSS
from jdkd.detect.norms import group_norm
from jdkd.detect.one_stage import BoxSides, at_least_single, flat, tower

BINS = 16  # n: distances are 0..16 steps, section 4.1
STEPS = 8  # a side of an anchor: one step is the stride where anchors are of 8 strides, as the paper has them
BOX_WEIGHT, DISTRIBUTION_WEIGHT = 2.0, 0.25  # lambda_0 and lambda_1 of equation 8


def quality_focal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """``|y - s|^2`` times the cross entropy of a score and a quality, element by element (equation 5, beta 2).

    Args:
        logits: of the scores s, any shape.
        quality: y in 0..1, of the same shape.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return (quality - logits.sigmoid()).square() * entropy


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """The cross entropies of the two whole numbers beside a distance, by how near each is (equation 6).

    Args:
        logits: ``[..., n + 1]``, of the distances 0..n.
        distances: ``[...]`` in 0..n.

    Returns:
        ``[...]``.
    """
    below = distances.floor().clamp(max=logits.shape[-1] - 2)
    share = distances - below  # of the upper one
    logs = logits.log_softmax(dim=-1)
    lower = logs.gather(-1, below.long()[..., None])[..., 0]
    upper = logs.gather(-1, below.long()[..., None] + 1)[..., 0]
    return -((1 - share) * lower + share * upper)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """The IoU of each box with the other of the same row: ``[M, 4]`` xyxy twice to ``[M]``."""
    sides = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    common = sides.prod(dim=1)
    areas = [(each[:, 2:] - each[:, :2]).prod(dim=1) for each in (boxes, others)]
    return common / (areas[0] + areas[1] - common).clamp(min=torch.finfo(common.dtype).tiny)


class GFL(ATSS):
    """A detector whose class scores say how well the box fits, and whose box sides are distributions.

    Positives are chosen as ATSS does. There is no centre-ness: the class score ranks the detections, as RetinaNet's.
    """

    postprocess_detections = RetinaNet.postprocess_detections

    def __init__(self, backbone: nn.Module, num_classes: int, **options: Any) -> None:
        super().__init__(backbone, num_classes, **options)
        self.box_coder = BoxSides()


class GFLHead(nn.Module):
    """Two towers as FCOS has them; the regression gives n + 1 logits for each side of a box.

    Args:
        channels: of the pyramid, a multiple of 8.
        outputs: classes with label 0, which stands for nothing.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.box_coder = BoxSides()
        self.classification_head = FCOSClassificationHead(channels, 1, outputs, norm_layer=group_norm)
        self.regression_head = DistributionHead(channels)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """``cls_logits`` [N, A, K], ``bbox_distribution`` [N, A, 4, n + 1], and its mean ``bbox_regression``
        [N, A, 4] in sizes of the anchor."""
        logits, distribution = self.classification_head(x), at_least_single(self.regression_head(x))
        steps = torch.arange(distribution.shape[-1], device=distribution.device, dtype=distribution.dtype)
        mean = (distribution.softmax(dim=-1) * steps).sum(dim=-1)  # equation 4
        return {
            "cls_logits": at_least_single(logits),
            "bbox_regression": mean / STEPS,
            "bbox_distribution": distribution,
        }

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Equation 8. As in section 4.1 each positive's box losses are weighted by its class score.

        Returns:
            ``classification`` (quality focal loss), ``bbox_regression`` (GIoU), ``bbox_distribution``.
        """
        matched = torch.stack(matched_idxs)  # [N, A]
        images, places = (matched >= 0).nonzero(as_tuple=True)  # [P] each
        which = matched[images, places]
        firsts = torch.tensor([0, *(len(t["boxes"]) for t in targets[:-1])], device=matched.device).cumsum(0)
        boxes, labels = (torch.cat([t[key] for t in targets])[firsts[images] + which] for key in ("boxes", "labels"))
        logits = head_outputs["cls_logits"]
        of_anchors = torch.stack(anchors)[images, places].to(logits.dtype)
        boxes = boxes.to(logits.dtype)
        predicted = self.box_coder.decode(head_outputs["bbox_regression"][images, places], of_anchors)
        quality = torch.zeros_like(logits)
        quality[images, places, labels] = paired_iou(predicted.detach(), boxes)
        weights = logits.detach()[images, places].sigmoid().amax(dim=1)  # [P]
        total = weights.sum().clamp(min=1e-6)
        distances = (self.box_coder.encode(of_anchors, boxes) * STEPS).clamp(0, BINS)
        distribution = distribution_focal_loss(head_outputs["bbox_distribution"][images, places], distances)  # [P, 4]
        fit = generalized_box_iou_loss(predicted, boxes)
        return {
            "classification": quality_focal_loss(logits, quality).sum() / max(1, len(which)),
            "bbox_regression": BOX_WEIGHT * (fit * weights).sum() / total,
            "bbox_distribution": DISTRIBUTION_WEIGHT * (distribution.mean(dim=1) * weights).sum() / total,
        }


class DistributionHead(nn.Module):
    """Four convolutions and one that gives the logits of the distances to the sides, left, top, right, bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = tower(channels, 4)
        self.bbox_reg = nn.Conv2d(channels, 4 * (BINS + 1), 3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)
        nn.init.zeros_(self.bbox_reg.bias)

    def forward(self, x: list[Tensor]) -> Tensor:  # [N, C, H, W] each -> [N, A, 4, n + 1]
        found = [flat(self.bbox_reg(self.conv(level))) for level in x]  # [N, HW, 4 (n + 1)]
        return torch.cat(found, dim=1).unflatten(2, (4, BINS + 1))
