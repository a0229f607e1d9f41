"""Detectors that were made for one size of input, for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jdkd.detect.atss import ATSS
from jdkd.detect.input_size import Regions, input_transform, require_order, require_whole, smallest_anchor
from jdkd.errors import InputError
from jdkd.rewrite.building import call


def resize(
    model: nn.Module, min_size: int | None = None, max_size: int | None = None, max_detections: int | None = None
) -> None:
    """Lets a detector resize its input to other sizes, and keep another number of detections, in place.

    Args:
        model: a detector with torchvision's transform.
        min_size, max_size: see :func:`jdkd.detect.detector`; where the first alone is given, it may raise the second.
        max_detections: of an image.

    Raises:
        InputError: it has no such transform, or its anchors are for one size alone.
    """
    sizes = {"min_size": min_size, "max_size": max_size, "max_detections": max_detections}
    require_whole({name: size for name, size in sizes.items() if size is not None})
    kind = type(model).__name__
    if max_detections is not None:
        heads = [module for module in model.modules() if isinstance(getattr(module, "detections_per_img", None), int)]
        if not heads:
            raise InputError(f"{kind} does not say how many detections it keeps; leave max_detections out.")
        for head in heads:
            cast(Any, head).detections_per_img = max_detections
    if min_size is None and max_size is None:
        return
    if (transform := input_transform(model)) is None:
        raise InputError(f"{kind} has no torchvision transform, which resizes images; leave min_size and max_size out.")
    if transform.fixed_size is not None:
        _square(model, transform, cast(int, max_size if min_size is None else min_size), max_size)
        return
    least = min(transform.min_size) if min_size is None else min_size
    most = max(transform.max_size, least) if max_size is None else max_size
    require_order(least, most)
    transform.min_size, transform.max_size = (least,), most


def _square(model: nn.Module, transform: GeneralizedRCNNTransform, size: int, max_size: int | None) -> None:
    kind = type(model).__name__
    if max_size not in (None, size):
        raise InputError(f"{kind} resizes images to {size}x{size}; leave max_size {max_size} out.")
    bound = [m for m in model.modules() if isinstance(m, DefaultBoxGenerator) and m.steps is not None]
    if bound and tuple(transform.fixed_size) != (size, size):
        raise InputError(
            f"{kind} is made for images of {transform.fixed_size[0]}x{transform.fixed_size[1]}, and {size} was asked "
            "for; leave min_size and max_size out, or give a backbone, over which ssd has any size."
        )
    transform.fixed_size, transform.min_size, transform.max_size = (size, size), (size,), size


def resized(builder: str, arguments: Mapping[str, Any], **sizes: int) -> nn.Module:
    """What a builder makes, for another size of input; see :func:`resize`.

    Anchors follow the short side as those of :func:`jdkd.detect.detector` do, and where it is under 400 pixels, fewer
    regions are proposed and sampled.

    Args:
        builder: import path ``"package.module:function"``.
        arguments: what it is called with.
        sizes: ``min_size``, ``max_size`` and ``max_detections``.
    """
    model = call(builder, arguments)
    before = input_transform(model)
    least = None if before is None else min(before.min_size)
    resize(model, **sizes)
    if least is None or "min_size" not in sizes:
        return model
    share = smallest_anchor(sizes["min_size"]) / smallest_anchor(least)
    regions = Regions.of(sizes["min_size"])
    for module in list(model.modules()):
        if regions != Regions() and isinstance(module, RegionProposalNetwork):
            kept = {"training": 2 * regions.proposals, "testing": regions.proposals}
            module._pre_nms_top_n = module._post_nms_top_n = kept
        if regions != Regions() and isinstance(module, RoIHeads):
            sampler = module.fg_bg_sampler
            sampler.batch_size_per_image, sampler.positive_fraction = regions.rois, regions.positives
        scaled = getattr(module, "anchor_generator", None)
        strides = isinstance(module, FCOS) and not isinstance(module, ATSS)
        if isinstance(scaled, AnchorGenerator) and not strides:
            sizes_now = tuple(tuple(max(1, int(share * size)) for size in level) for level in scaled.sizes)
            module.anchor_generator = AnchorGenerator(sizes_now, scaled.aspect_ratios)
    return model
