"""The non-maximum suppressions that exported detectors have, as :data:`jdkd.detect.exportable.Suppress` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

from jdkd.detect.exportable import NOTHING

BETWEEN = (NOTHING + 0.0) / 2  # a score between that of nothing and those of detections


def by_torchvision(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """By torchvision's operator, each group moved beside the others, in fp64, whose steps are too fine to matter.

    An exported program takes for granted that the operator keeps two boxes at least, so it is given two that are never
    suppressed, since they lie by themselves, and that come last.
    """
    image, group, box = torch.where(scores > BETWEEN)
    apart = boxes.amax().double() + 1
    moved = boxes[image, box].double() + ((image * scores.shape[1] + group) * apart)[:, None]
    alone = moved.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    last = moved.new_full((len(alone),), NOTHING)
    kept = nms(torch.cat((moved, alone)), torch.cat((scores[image, group, box].double(), last)), iou)
    return torch.stack((image, group, box), dim=1)[kept[: -len(alone)]]


def by_score(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """The best of every group, however they overlap: for the time of a detector whose weights find nothing yet."""
    best = scores.topk(min(most, scores.shape[-1]), dim=-1).indices  # [B, G, most]
    image, group = (torch.arange(size, device=best.device) for size in scores.shape[:2])
    return torch.stack(torch.broadcast_tensors(image[:, None, None], group[:, None], best), dim=-1).flatten(0, 2)


class ByOnnx(torch.autograd.Function):
    """By ONNX's operator, which knows groups."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
        return by_torchvision(boxes, scores, iou, most)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou: float, most: int) -> Any:
        def constant(value: float, dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor([value], dtype=dtype))

        given = constant(most, torch.int64), constant(iou, torch.float32), constant(BETWEEN, torch.float32)
        return g.op("NonMaxSuppression", boxes, scores, *given)


def by_onnx(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """As :func:`by_torchvision`, and ``NonMaxSuppression`` in what ``torch.onnx`` writes."""
    return ByOnnx.apply(boxes, scores, iou, most)
