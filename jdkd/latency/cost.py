"""See :func:`count`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jdkd.detect import fix_roi_scales


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
        model: a detector on any device; it is left as it was.
        size: image height and width; by default the detector's input size: its short side by its longest
            side.

    Returns:
        Parameters and GMACs.
    """
    fix_roi_scales(model)
    bare = copy.copy(model)
    bare._modules = dict(model._modules)
    if hasattr(model, "rpn"):
        bare._modules["rpn"] = _FullProposals(model.rpn)
    modes = {module: module.training for module in bare.modules()}
    size = size or _input_size(model)
    device = next(model.parameters()).device
    try:
        bare.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            bare([torch.zeros(3, *size, device=device)])
    finally:
        for module, training in modes.items():
            module.training = training
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(params, counter.get_total_flops() / 2e9, (size[0], size[1]))


def _input_size(model: nn.Module) -> tuple[int, int]:
    """Largest image that a torchvision detector's transform makes: (min_size, max_size)."""
    transform = model.transform
    return transform.min_size[-1], max(transform.min_size[-1], transform.max_size)
