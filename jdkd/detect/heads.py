"""Where torchvision's detectors say which class is where, and how another one is asked about the same places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.models.detection.ssd import SSDScoringHead
from torchvision.models.detection.transform import resize_boxes

from jdkd.detect.reppoints import RepPointsHead

FOCAL = (RetinaNetClassificationHead, FCOSClassificationHead, RepPointsHead)  # a sigmoid for each class
DENSE = (*FOCAL, SSDScoringHead)
LAYOUT = ("sizes", "aspect_ratios", "scales", "steps", "clip")  # what says where anchors are, and how large


class ClassHead(Protocol):
    """The part of a detector that gives class logits.

    Attributes:
        outputs: logits at each place, label 0 included, which is the background or stands for nothing.
        exclusive: whether a place has one class (softmax), or each class by itself (sigmoid).
        dense: whether its places are all anchors; else the regions that were proposed.
        says: the module whose output holds the logits.
        asked: the module whose inputs hold the places; None where these are always the same.
    """

    outputs: int
    exclusive: bool
    dense: bool
    says: nn.Module
    asked: nn.Module | None

    def logits(self, output: Any) -> Tensor:
        """``[R, K]``, the logits at all places, of what ``says`` returned."""

    def places(self, inputs: tuple[Any, ...]) -> Any:
        """The places in the inputs of ``asked``."""

    def about(self, places: Any, levels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]] | None) -> Tensor:
        """``[R, K]``, the logits at another head's places.

        Args:
            places: the other's.
            levels: of its own detector, name -> ``[N, C, H, W]``.
            sizes: height and width of every image in its own detector, where the other saw them in another size.
        """

    def objection(self, other: ClassHead) -> str | None:
        """Why two heads do not speak of the same places and classes."""


def class_head(model: nn.Module) -> ClassHead | None:
    """The class head of a detector of torchvision's parts, wherever in it that is; None without one."""
    return next((head for module in model.modules() if (head := _head_in(module)) is not None), None)


def known_classes(model: nn.Module) -> int | None:
    """How many classes a detector of torchvision's tells apart, without label 0, the background; None for others."""
    head = _head_in(model)
    return None if head is None else head.outputs - 1


def is_two_stage(model: nn.Module) -> bool:
    """Whether a detector looks twice: it proposes regions and classifies those."""
    return any(hasattr(module, name) for module in model.modules() for name in ("roi_heads", "roi_head"))


def _head_in(module: nn.Module) -> ClassHead | None:
    heads = getattr(module, "roi_heads", None)
    scores = getattr(getattr(heads, "box_predictor", None), "cls_score", None)
    if hasattr(heads, "box_roi_pool") and isinstance(getattr(scores, "out_features", None), int):
        return _OfRegions(heads)
    anchors = getattr(module, "anchor_generator", None)
    head = getattr(module, "head", None)
    if isinstance(head, RepPointsHead):
        return _OfPoints(head, anchors)
    head = getattr(head, "classification_head", None)
    return _OfAnchors(head, anchors) if isinstance(head, DENSE) else None


class _OfRegions:
    """The box head of two-stage detectors: Faster, Mask and Keypoint R-CNN."""

    exclusive, dense = True, False

    def __init__(self, heads: nn.Module) -> None:
        self.heads, self.asked, self.says = heads, heads.box_roi_pool, heads.box_predictor
        self.outputs = heads.box_predictor.cls_score.out_features

    def logits(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0]

    def places(self, inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The regions, ``[M, 4]`` each, and the size of every image."""
        _, regions, sizes = inputs
        return [region.detach() for region in regions], list(sizes)

    def about(self, places: Any, levels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]] | None) -> Tensor:
        """Half precision is pooled in single, as autocast does."""
        regions, seen = places
        like = next(self.heads.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        levels = {name: level.to(wide) for name, level in levels.items()}
        regions = [region.to(wide) for region in regions]
        if sizes is not None:
            pairs = zip(regions, seen, sizes, strict=True)
            regions, seen = [resize_boxes(region, before, after) for region, before, after in pairs], list(sizes)
        pooled = self.heads.box_roi_pool(levels, regions, seen)  # [R, C, 7, 7]
        return self.says(self.heads.box_head(pooled.to(like.dtype)))[0]

    def objection(self, other: ClassHead) -> str | None:
        return None if isinstance(other, _OfRegions) else "one classifies regions and the other anchors"


class _OfAnchors:
    """The classification head of one-stage detectors: RetinaNet, FCOS, SSD, SSDlite."""

    asked, dense = None, True

    def __init__(self, head: nn.Module, anchors: nn.Module | None) -> None:
        self.says, self.exclusive = head, not isinstance(head, FOCAL)
        self.outputs = head.num_columns if self.exclusive else head.num_classes
        self.anchors = anchors
        self.layout = type(anchors), [repr(getattr(anchors, name, None)) for name in LAYOUT]

    def logits(self, output: Tensor) -> Tensor:
        return output.flatten(0, 1)  # of [N, anchors, K]

    def places(self, inputs: tuple[Any, ...]) -> None:
        return None

    def about(self, places: None, levels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]] | None) -> Tensor:
        return self.logits(self.says(list(levels.values())))

    def objection(self, other: ClassHead) -> str | None:
        if not isinstance(other, _OfAnchors):
            return "one classifies anchors and the other regions"
        if self.exclusive != other.exclusive:
            return "one has a softmax over its classes and the other a sigmoid for each"
        if self.layout == other.layout:
            return None
        return f"their anchors differ, so that a place stands for other objects ({_said(self)}, and {_said(other)})"


def _said(head: _OfAnchors) -> str:
    """How many anchors a place has, and of what sizes."""
    anchors = head.anchors
    if not isinstance(anchors, AnchorGenerator):
        return f"a {type(anchors).__name__}"
    sizes = sorted(size for level in anchors.sizes for size in level)
    ratios = ", ".join(f"{ratio:g}" for ratio in anchors.aspect_ratios[0])
    count = anchors.num_anchors_per_location()[0]
    return f"{count} a place of {sizes[0]:g} to {sizes[-1]:g} pixels with ratios {ratios}"


class _OfPoints(_OfAnchors):
    """The head of RepPoints, whose classes are read where its points lie."""

    def logits(self, output: Mapping[str, Tensor]) -> Tensor:
        return output["cls_logits"].flatten(0, 1)
