"""What is timed of a detector from end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jdkd.detect.contract import detections
from jdkd.errors import InputError

TimedCall = Callable[[int], object]
"""Runs a model on batch number i of those it was prepared for."""


def on_device(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Images as the detector takes them: on its device, floats in 0..1."""
    moved = [image.to(device, non_blocking=True) for image in batch]
    return [image.float().div_(255) if image.dtype == torch.uint8 else image for image in moved]


def end_to_end(model: nn.Module, batches: Sequence[Sequence[Tensor]], device: torch.device) -> TimedCall:
    """From the decoded images on the host to the boxes on the host, through transform and NMS.

    Args:
        model: a detector in eval mode on `device`.
        batches: lists of images [3, H, W] on the host, uint8 or float in 0..1.
        device: where the model runs.

    Returns:
        A call that runs batch i.
    """

    def call(index: int) -> list[dict[str, Tensor]]:
        found = detections(model, on_device(batches[index], device))
        return [{name: value.cpu() for name, value in each.items()} for each in found]

    return call


def check_images(images: Sequence[Tensor]) -> None:
    """Refuse what no detector takes.

    Raises:
        InputError: there is no image, or one is not [3, H, W] in uint8 or a float type.
    """
    if not len(images):
        raise InputError("images is empty; latency is measured on at least one image [3, H, W]")
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise InputError(
                f"images[{index}] has shape {list(image.shape)} and dtype {image.dtype}; give "
                "[3, H, W] in uint8 or a float type in 0..1"
            )
