"""Whether an accelerated detector does what the plain one does: see :func:`difference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from jdkd.detect.contract import detections
from jdkd.detect.stages import BACKBONE, HEAD, NECK, stages_of
from jdkd.errors import InputError, said
from jdkd.export.parity import Parity, Tolerance, numbers
from jdkd.latency.calls import on_device

TOLERANCE = Tolerance(iou=0.999, score=1e-3, mask=0.99, share=0.99, stage=1e-4)
"""Detections: a share of them, with boxes of this IoU and scores that differ by no more. What backbone, neck and heads
return for the same input: by which values may differ, as a share of the largest."""


@dataclass(frozen=True)
class Difference:
    """The most that two detectors differ by.

    Args:
        stage: what backbone, neck and heads return, as a share of the largest value.
        box, score, mask: detections, in pixels, in score, in IoU below 1.
        detections: that were compared, of both.
        reason: what is beyond the tolerance, in one clause; None where nothing is.
    """

    stage: float
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    detections: int = 0
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def difference(plain: nn.Module, other: nn.Module, images: Sequence[Tensor], tolerance: Tolerance) -> Difference:
    """Compares two detectors of the same structure.

    Every stage of the other one is run on what the plain one's was given, so that one rounding that exchanges two
    proposals is not taken for a fault of what comes after; then both find what is on the images.

    Args:
        plain, other: the detectors.
        images: ``[3, H, W]``, uint8 or floats in 0..1.
        tolerance: what they may differ by.
    """
    device = next(plain.parameters()).device
    compared, worst = Parity(), 0.0
    try:
        for image in images:
            given = on_device([image], device)
            with torch.no_grad(), _listening(plain) as calls:
                ours = detections(plain, given)
            for path, args, named, out in calls:
                with torch.no_grad():
                    error = _error(out, other.get_submodule(path)(*args, **named))
                worst = max(worst, error)
                if not error <= tolerance.stage:
                    return Difference(error, reason=f"{path} differs by {error:.1e} of its largest value")
            with torch.no_grad():
                theirs = detections(other, given)
            for one, two in zip(ours, theirs, strict=True):
                compared.compare(numbers(one), numbers(two), tolerance, _least)
    except Exception as error:  # whatever kernels and a model's own code say of it
        return Difference(float("inf"), reason=f"it raises {said(error)}")
    count = compared.same + compared.other
    beyond = count and compared.same < tolerance.share * count
    reason = f"only {compared.same} of {count} detections agree" if beyond else None
    return Difference(worst, compared.box, compared.score, compared.mask, count, reason)


def _least(found: Any) -> float:
    """The lowest score that is kept; one of about that may be missing from the other."""
    return float(found["scores"].min()) if len(found["scores"]) else 0.0


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[tuple[str, Any, Any, Any]]]:
    """What the stages of a detector are given and return, call by call."""
    try:
        stages = {module for module, method, stage in stages_of(model) if stage in (BACKBONE, NECK, HEAD)}
    except InputError:  # it does not say what is what
        stages = set(model.children())
    paths = {path: module for path, module in model.named_modules() if module in stages}
    calls: list[tuple[str, Any, Any, Any]] = []
    waiting: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: Any, named: Any) -> None:
        waiting.append(_kept((args, named)))

    def after(path: str) -> Any:
        return lambda module, args, named, out: calls.append((path, *waiting.pop(), _kept(out)))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in paths.values()]
    handles += [module.register_forward_hook(after(path), with_kwargs=True) for path, module in paths.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _kept(values: Any) -> Any:
    """Copies, as layers write in place."""
    return tree_map_only(Tensor, lambda value: value.detach().clone(), values)


def _error(ours: Any, theirs: Any) -> float:
    pairs = list(zip(tree_leaves(ours), tree_leaves(theirs), strict=True))
    errors = [0.0]
    for one, other in pairs:
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
            if one.shape != other.shape:
                return float("inf")
            error = float((one.float() - other.float()).abs().max() / one.float().abs().max().clamp(min=1e-12))
            errors.append(error if error == error else float("inf"))
    return max(errors)
