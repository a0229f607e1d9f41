"""How many regions are proposed and kept, and which: for comparisons that must not depend on weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import boxes as box_ops

from jdkd.detect.contract import detections
from jdkd.nn.modes import mode


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


def nms_counts(model: nn.Module, images: Sequence[Tensor]) -> tuple[int, ...]:
    """How many boxes each NMS of a detector keeps, call by call, mean over images; nothing where none is torchvision's.

    Args:
        model: a detector; left as it was.
        images: ``[3, H, W]``, one at a time.
    """
    kept: list[list[int]] = []

    def counting(nms: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*given: Any, **named: Any) -> Tensor:
            found = nms(*given, **named)
            kept[-1].append(len(found))
            return found

        return counted

    with _nms(counting), mode(model, training=False), torch.no_grad():
        for image in images:
            kept.append([])
            detections(model, [image])
    return tuple(round(sum(counts) / len(counts)) for counts in zip(*kept, strict=False))


@contextmanager
def steady_nms(counts: Sequence[int]) -> Iterator[None]:
    """Lets torchvision's NMS keep so many boxes for a while, those of the best scores, however they overlap.

    What NMS costs, and what comes after it, depends on the detections. Those of a detector that was cut and not yet
    trained are none, and its time is not that of one that was.

    Args:
        counts: call by call, as :func:`nms_counts` found them, again and again.
    """
    calls = 0

    def keeping(nms: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def best(boxes: Tensor, scores: Tensor, *others: Any, **named: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return scores.topk(min(len(scores), counts[(calls - 1) % len(counts)])).indices

        return best if counts else nms

    with _nms(keeping):
        yield


@contextmanager
def _nms(changed: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    before = box_ops.batched_nms
    box_ops.batched_nms = changed(before)
    try:
        yield
    finally:
        box_ops.batched_nms = before
