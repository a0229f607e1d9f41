"""See :func:`profile_cost`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jdkd.detect import fix_roi_scales, parameter_count
from jdkd.detect.contract import detections, not_scripted
from jdkd.detect.input_size import input_transform, require_visible
from jdkd.detect.proposals import full_proposals
from jdkd.errors import InputError
from jdkd.nn.modes import mode
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


def profile_cost(
    model: nn.Module, size: tuple[int, int] | None = None, *, otherwise: tuple[int, int] | None = None
) -> Cost:
    """Count parameters and multiply-accumulates of a detector for one image.

    A two-stage detector is charged with as many proposals as its RPN may keep, whatever its weights propose,
    so that counts of architectures can be compared. NMS, RoI align and normalisation count as nothing. FLOPs are
    those of torch's `FlopCounterMode`; a multiply-accumulate is two of them.

    Args:
        model: a detector with torchvision's interface on any device, wrapped or not; it is left as it was, but for
            scales of RoI pools that were inferred wrongly (:func:`jdkd.detect.fix_roi_scales`).
        size: image height and width; by default the detector's input size: its short side by its longest
            side.
        otherwise: the same for a detector that has no input size of its own, and takes images as they are.

    Returns:
        Parameters and GMACs.

    Raises:
        InputError: the model is no detector or is scripted, or its input size is not known and not given.
    """
    not_scripted(model, "profile_cost")
    model = unwrapped(model)
    fix_roi_scales(model)
    size = size or _input_size(model, otherwise)
    require_visible(model, [("size", *size)])
    like = next(model.parameters(), torch.empty(0))
    counter = FlopCounterMode(display=False)
    with mode(model, training=False), full_proposals(model), torch.no_grad(), counter:
        detections(model, [torch.zeros(3, *size, device=like.device)])
    return Cost(parameter_count(model), counter.get_total_flops() / 2e9, (size[0], size[1]))


def _input_size(model: nn.Module, otherwise: tuple[int, int] | None) -> tuple[int, int]:
    """Largest image that a torchvision detector's transform makes: (min_size, max_size)."""
    transform = input_transform(model)
    if transform is None and otherwise is not None:
        return otherwise
    if transform is None:
        raise InputError(
            f"profile_cost does not know the input size of a {type(model).__name__}, which has no torchvision "
            "transform; give size=(height, width)"
        )
    return transform.min_size[-1], max(transform.min_size[-1], transform.max_size)
