"""See :func:`full_proposals`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork


@contextmanager
def full_proposals(model: nn.Module) -> Iterator[None]:
    """Lets every RPN in a model hand on as many proposals as it may for a while, whatever its weights propose."""
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


class _FullProposals(nn.Module):
    """Runs an RPN and hands on as many proposals as it may return, so that the count ignores the weights."""

    def __init__(self, rpn: nn.Module) -> None:
        super().__init__()
        self.rpn = rpn

    def forward(self, images, features, targets=None) -> tuple[list[Tensor], dict[str, Tensor]]:
        self.rpn(images, features, targets)
        boxes = [torch.tensor([[0.0, 0.0, width, height]]) for height, width in images.image_sizes]
        return [box.to(images.tensors).repeat(self.rpn.post_nms_top_n(), 1) for box in boxes], {}
