"""How many regions an RPN proposes, and which: for comparisons that must not depend on its weights."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def proposals_of(model: nn.Module, known: MutableMapping[str, Any]) -> Iterator[None]:
    """Remembers what every RPN proposes, or proposes what is known, so that two models see the same regions.

    Args:
        model: a detector.
        known: proposals by the path of the RPN, which still runs; those that are missing are added.
    """

    def left(path: str) -> Any:
        def proposed(module: nn.Module, inputs: Any, out: tuple[list[Tensor], dict[str, Tensor]]) -> Any:
            return known.setdefault(path, out[0]), out[1]

        return proposed

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, RegionProposalNetwork)]
    handles = [module.register_forward_hook(left(path)) for path, module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
