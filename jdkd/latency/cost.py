"""See :func:`count`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.rpn import RegionProposalNetwork

from jdkd.detect import fix_roi_scales, parameter_count
from jdkd.detect.contract import detections, not_scripted
from jdkd.detect.input_size import input_transform, require_visible
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped


@dataclass(frozen=True)
class Cost:
    """Size and arithmetic of a detector.

    Args:
        params: parameters, trained or not.
        gmacs: 10^9 multiply-accumulates of convolutions and matrix products for one image.
        size: height and width of that image before the detector's own transform.
    """

    params: int
    gmacs: float
    size: tuple[int, int]


class _FullProposals(nn.Module):
    """Runs an RPN and hands on as many proposals as it may return, so that the count ignores the weights."""

    def __init__(self, rpn: nn.Module) -> None:
        super().__init__()
        self.rpn = rpn

    def forward(self, images, features, targets=None) -> tuple[list[Tensor], dict[str, Tensor]]:
        self.rpn(images, features, targets)
        boxes = [torch.tensor([[0.0, 0.0, width, height]]) for height, width in images.image_sizes]
        return [box.to(images.tensors).repeat(self.rpn.post_nms_top_n(), 1) for box in boxes], {}


def count(model: nn.Module, size: tuple[int, int] | None = None) -> Cost:
    """Count parameters and multiply-accumulates of a detector for one image.

    A two-stage detector is charged with as many proposals as its RPN may keep, whatever its weights propose,
    so that counts of specs can be compared. NMS, RoI align and normalisation count as nothing. FLOPs are
    those of torch's `FlopCounterMode`; a multiply-accumulate is two of them.

    Args:
        model: a detector with torchvision's interface on any device, wrapped or not; it is left as it was, but for
            scales of RoI pools that were inferred wrongly (:func:`jdkd.detect.fix_roi_scales`).
        size: image height and width; by default the detector's input size: its short side by its longest
            side.

    Returns:
        Parameters and GMACs.

    Raises:
        InputError: the model is no detector or is scripted, or its input size is not known and not given.
    """
    not_scripted(model, "count")
    model = unwrapped(model)
    fix_roi_scales(model)
    size = size or _input_size(model)
    require_visible(model, [("size", *size)])
    like = next(model.parameters(), torch.empty(0))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with _full_proposals(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            detections(model, [torch.zeros(3, *size, device=like.device)])
    finally:
        for module, training in modes.items():
            module.training = training
    return Cost(parameter_count(model), counter.get_total_flops() / 2e9, (size[0], size[1]))


@contextmanager
def _full_proposals(model: nn.Module) -> Iterator[None]:
    """Puts :class:`_FullProposals` around every RPN in the model for a while."""
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, RegionProposalNetwork)
    ]
    try:
        for owner, name, rpn in found:
            owner._modules[name] = _FullProposals(rpn).eval()
        yield
    finally:
        for owner, name, rpn in found:
            owner._modules[name] = rpn


def _input_size(model: nn.Module) -> tuple[int, int]:
    """Largest image that a torchvision detector's transform makes: (min_size, max_size)."""
    transform = input_transform(model)
    if transform is None:
        raise InputError(
            f"count does not know the input size of a {type(model).__name__}, which has no torchvision transform; give "
            "size=(height, width)"
        )
    return transform.min_size[-1], max(transform.min_size[-1], transform.max_size)
