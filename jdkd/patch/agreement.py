"""Whether an accelerated detector does what the plain one does: see :class:`Reference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from jdkd.detect.contract import detections
from jdkd.detect.stages import BACKBONE, HEAD, NECK, stages_of
from jdkd.errors import InputError, said
from jdkd.export.parity import Parity, Tolerance, numbers
from jdkd.export.preparing import Found
from jdkd.latency.calls import on_device

TOLERANCE = Tolerance(iou=0.999, score=1e-3, mask=0.99, share=0.99, stage=1e-4)
"""Detections: a share of them, with boxes of this IoU and scores that differ by no more. What backbone, neck and heads
return for the same input: by which values may differ, as a share of the largest."""


Call = tuple[str, Any, Any, Any]
"""Path of a module, what it was called with, by position and by name, and what it returned."""


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


class Reference:
    """What a plain detector makes of some images, to compare others with.

    Every stage of another one is run on what the plain one's was given, so that one rounding that exchanges two
    proposals is not taken for a fault of what comes after; then it is to find the same.

    Args:
        plain: the detector.
        images: ``[3, H, W]``, uint8 or floats in 0..1.

    Raises:
        InputError: it does not run on them.
    """

    def __init__(self, plain: nn.Module, images: Sequence[Tensor]) -> None:
        device = next(plain.parameters()).device
        self._cut = partial(_cut, _limits(plain))
        self._images = [on_device([image], device) for image in images]
        self._calls: list[Call] = []
        self._found = []
        with torch.no_grad(), _listening(plain, self._calls):
            self._found = [numbers(detections(plain, given)[0]) for given in self._images]

    def difference(self, other: nn.Module, tolerance: Tolerance) -> Difference:
        """How far another detector of the same structure is from it, and what of that is beyond a tolerance."""
        compared, worst = Parity(), 0.0
        try:
            with torch.no_grad():
                for path, args, named, out in self._calls:
                    error = _error(out, other.get_submodule(path)(*_kept(args), **_kept(named)))
                    worst = max(worst, error)
                    if not error <= tolerance.stage:
                        return Difference(error, reason=f"{path} differs by {error:.1e} of its largest value")
                for given, ours in zip(self._images, self._found, strict=True):
                    compared.compare(ours, numbers(detections(other, given)[0]), tolerance, self._cut)
        except Exception as error:  # whatever kernels and a model's own code say of it
            return Difference(float("inf"), reason=f"it raises {said(error)}")
        count = compared.same + compared.other
        beyond = count and compared.same < tolerance.share * count
        reason = f"only {compared.same} of {count} detections agree" if beyond else None
        return Difference(worst, compared.box, compared.score, compared.mask, count, reason)


def _limits(model: nn.Module) -> tuple[int, float] | None:
    """How many detections a detector of torchvision's keeps, and above which score; None of another."""
    limits = ((getattr(m, "detections_per_img", None), getattr(m, "score_thresh", None)) for m in model.modules())
    known = [(most, float(least)) for most, least in limits if isinstance(most, int) and isinstance(least, int | float)]
    return known[0] if len(known) == 1 else None


def _cut(limits: tuple[int, float] | None, mine: Found, its: Found) -> float:
    """The score up to which one of ``mine`` may be missing from ``its``: by a rounding it was not among those kept.

    Where limits are not known, what keeps fewer than the other has kept all that it found.
    """
    lowest = [float(found["scores"].min()) if len(found["scores"]) else 0.0 for found in (mine, its)]
    most, least = limits or (len(mine["scores"]), min(lowest))
    return lowest[1] if len(its["scores"]) >= most else least


@contextmanager
def _listening(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Collects what the stages of a detector are given and return."""
    try:
        stages = {module for module, method, stage in stages_of(model) if stage in (BACKBONE, NECK, HEAD)}
    except InputError:  # it does not say what is what
        stages = set(model.children())
    paths = {path: module for path, module in model.named_modules() if module in stages}
    waiting: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: Any, named: Any) -> None:
        waiting.append(_kept((args, named)))

    def after(path: str) -> Any:
        return lambda module, args, named, out: calls.append((path, *waiting.pop(), _kept(out)))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in paths.values()]
    handles += [module.register_forward_hook(after(path), with_kwargs=True) for path, module in paths.items()]
    try:
        yield
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
