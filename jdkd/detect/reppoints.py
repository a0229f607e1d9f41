"""RepPoints: objects as sets of points, which a deformable convolution reads (Yang et al., ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.ops import DeformConv2d, box_iou, deform_conv2d, sigmoid_focal_loss

from jdkd.detect.one_stage import PRIOR, BoxSides, at_least_single, flat, tower

POINTS = 9  # of an object, section 3.1: the samples of a 3x3 convolution
SCALE = 4  # cells of a level: its objects have sides of 4 to 8, section 4.2; the unit of the box losses
POSITIVE, NEGATIVE = 0.5, 0.4  # IoU of the first box with an object, section 4.2
INITIAL_WEIGHT = 0.5  # of the first points' loss, the refined ones' is 1
BETA = 1 / 9  # below which the box losses are quadratic
FLAT = 1e-6  # added to a variance, so that points in one place have a gradient


def initial_assignment(anchors: Tensor, per_level: Sequence[int], boxes: Tensor) -> Tensor:
    """Which object each place's first points are trained on (section 4.2, the first localisation stage).

    An object of sides w and h belongs to the level of stride 2^floor(log2(sqrt(wh) / 4)), or the nearest that there is,
    and to the place there that is nearest to its centre. Of two objects at one place the nearer one has it.

    Args:
        anchors: ``[A, 4]`` xyxy in pixels, level after level, each of a stride's size about its place.
        per_level: how many of them each level has.
        boxes: of the objects, ``[M, 4]`` xyxy in pixels.

    Returns:
        The number of each place's object, ``[A]``; -1 for none.
    """
    if len(boxes) == 0:
        return anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    octaves = (anchors[:, 2] - anchors[:, 0]).log2().round()  # [A]
    sides = (boxes[:, 2:] - boxes[:, :2]).log2().mean(dim=1)  # [M], of the geometric mean
    own = (sides - math.log2(SCALE)).floor().clamp(octaves.min(), octaves.max())
    centers, of_boxes = ((each[:, :2] + each[:, 2:]) / 2 for each in (anchors, boxes))
    distances = (of_boxes[:, None] - centers).square().sum(2)  # [M, A]
    distances = distances.masked_fill(own[:, None] != octaves, math.inf)
    least, nearest = distances.min(dim=1, keepdim=True)
    best, matched = torch.full_like(distances, math.inf).scatter(1, nearest, least).min(dim=0)
    return matched.masked_fill(best.isinf(), -1)


def refined_assignment(predicted: Tensor, boxes: Tensor) -> Tensor:
    """Which object each place's class and refined points are trained on (section 4.2), by the first points' boxes.

    That with the highest IoU, from 0.5 on; under 0.4 it is background, between the two it counts for nothing. The box
    that fits an object best is its own however badly it fits, unless it lies beside it.

    Args:
        predicted: ``[A, 4]`` xyxy in pixels.
        boxes: of the objects, ``[M, 4]``.

    Returns:
        The number of each place's object, ``[A]``; -1 for background, -2 for neither.
    """
    if len(boxes) == 0:
        return torch.full((len(predicted),), -1, dtype=torch.int64, device=predicted.device)
    overlaps = box_iou(boxes, predicted)  # [M, A]
    best, matched = overlaps.max(dim=0)
    matched = matched.masked_fill(best < POSITIVE, -2).masked_fill(best < NEGATIVE, -1)
    highest = overlaps.max(dim=1, keepdim=True).values
    own, whose = overlaps.where((overlaps == highest) & (overlaps > 0), 0.0).max(dim=0)
    return torch.where(own > 0, whose, matched)


def boxes_of_points(points: Tensor, log_scale: Tensor) -> Tensor:
    """Boxes about points by their moments: mean -+ scale * standard deviation (section 3.2, the third conversion).

    Args:
        points: ``[..., P, 2]`` as (y, x) from a place.
        log_scale: logarithms of the multipliers of y and x, ``[2]``.

    Returns:
        ``[..., 4]``, how far left, top, right and bottom lie from the place.
    """
    points = at_least_single(points)
    variance, mean = torch.var_mean(points, dim=-2, correction=0)  # [..., 2]
    reach = (variance + FLAT).sqrt() * log_scale.to(points.dtype).exp()
    (top, left), (bottom, right) = ((reach + sign * mean).unbind(-1) for sign in (-1, 1))
    return torch.stack((left, top, right, bottom), dim=-1)


class RepPoints(FCOS):
    """RPDet, section 4: an anchor-free detector that represents objects by points all the way.

    Class scores rank the detections, as RetinaNet's.
    """

    postprocess_detections = RetinaNet.postprocess_detections

    def __init__(self, backbone: nn.Module, num_classes: int, **options: Any) -> None:
        super().__init__(backbone, num_classes, **options)
        self.box_coder = BoxSides()

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """Section 4.2.

        Returns:
            ``bbox_initial`` and ``bbox_regression`` (smooth L1 of the corners), ``classification`` (focal loss).
        """
        logits, places = head_outputs["cls_logits"], torch.stack(anchors)
        first = self.box_coder.decode(head_outputs["bbox_initial"].detach(), places)
        sums = {"classification": [], "bbox_regression": [], "bbox_initial": []}
        counts = dict.fromkeys(("initial", "refined"), 0)
        for n, target in enumerate(targets):
            boxes, labels = target["boxes"], target["labels"]
            initial = initial_assignment(places[n], num_anchors_per_level, boxes)
            refined = refined_assignment(first[n], boxes.to(first.dtype))
            for name, matched, key in (("initial", initial, "bbox_initial"), ("refined", refined, "bbox_regression")):
                kept = matched >= 0
                wanted = self.box_coder.encode(places[n][kept], boxes[matched[kept]])
                found = head_outputs[key][n][kept]
                sums[key].append(
                    F.smooth_l1_loss(found / SCALE, wanted.to(found.dtype) / SCALE, beta=BETA, reduction="sum")
                )
                counts[name] += len(found)
            classes = torch.zeros_like(logits[n])
            kept = (refined >= 0).nonzero()[:, 0]
            classes[kept, labels[refined[kept]]] = 1
            told = refined != -2
            sums["classification"].append(sigmoid_focal_loss(logits[n][told], classes[told], reduction="sum"))
        total = {key: torch.stack(parts).sum() for key, parts in sums.items()}
        return {
            "classification": total["classification"] / max(1, counts["refined"]),
            "bbox_regression": total["bbox_regression"] / max(1, counts["refined"]),
            "bbox_initial": INITIAL_WEIGHT * total["bbox_initial"] / max(1, counts["initial"]),
        }


class RepPointsHead(nn.Module):
    """Two towers; the first points say where the deformable convolutions of both branches look (figure 3).

    Args:
        channels: of the pyramid, a multiple of 8.
        outputs: classes with label 0, which stands for nothing.

    Attributes:
        log_scale: logarithms of the multipliers of the moments, learnt and shared by all places, ``[2]``.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.num_classes = outputs
        self.classification_tower, self.points_tower = tower(channels, 3), tower(channels, 3)
        self.initial_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.initial_points = nn.Conv2d(channels, 2 * POINTS, 1)
        self.classification_deform = Deformable(channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(channels, outputs, 1)
        self.points_deform = Deformable(channels, channels, 3, padding=1)
        self.refined_points = nn.Conv2d(channels, 2 * POINTS, 1)
        self.log_scale = nn.Parameter(torch.zeros(2))
        for module in (*self.children(),)[2:]:  # as the towers
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """``cls_logits`` [N, A, K], and the boxes of the first and of the refined points, ``bbox_initial`` and
        ``bbox_regression`` [N, A, 4], in cells."""
        found = [self._of_level(level) for level in x]
        logits, initial, refined = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        log_scale = _slowed(self.log_scale, 0.01)
        return {
            "cls_logits": at_least_single(logits),
            "bbox_initial": boxes_of_points(initial.unflatten(2, (POINTS, 2)), log_scale),
            "bbox_regression": boxes_of_points(refined.unflatten(2, (POINTS, 2)), log_scale),
        }

    def _of_level(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[N, HW, K]`` and both sets of points ``[N, HW, 18]`` of a map ``[N, C, H, W]``."""
        about_class, about_points = self.classification_tower(level), self.points_tower(level)
        initial = self.initial_points(F.relu(self.initial_conv(about_points)))  # [N, 18, H, W], y and x in turn
        steps = torch.arange(-1, 2, device=level.device, dtype=initial.dtype)
        own = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 1, 1)  # the kernel's [18]
        offset = _slowed(initial, 0.1) - own
        logits = self.cls_logits(F.relu(self.classification_deform(about_class, offset)))
        moved = self.refined_points(F.relu(self.points_deform(about_points, offset)))
        return flat(logits), flat(initial), flat(initial.detach() + moved)


class Deformable(DeformConv2d):
    """torchvision's deformable convolution, in fp32 where it is in half precision, which its kernels lack."""

    def forward(self, feature: Tensor, offset: Tensor) -> Tensor:
        weight, bias, *given = map(at_least_single, (self.weight, self.bias, feature, offset))
        with torch.autocast(feature.device.type, enabled=False):
            found = deform_conv2d(*given, weight, bias, self.stride, self.padding, self.dilation)
        return found.to(feature.dtype)


def _slowed(values: Tensor, share: float) -> Tensor:
    """The same values, of whose gradient a share goes on (as the authors' code has it)."""
    return share * values + (1 - share) * values.detach()
