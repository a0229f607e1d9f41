"""The three things that are timed of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jdkd.detect.contract import detections
from jdkd.detect.prepared import Prepared
from jdkd.errors import InputError
from jdkd.nn.necks import trunk_of

TimedCall = Callable[[int], object]
"""Runs a model on batch number i of those it was prepared for."""


def _on_device(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
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
        found = detections(model, _on_device(batches[index], device))
        return [{name: value.cpu() for name, value in each.items()} for each in found]

    return call


def model_only(model: nn.Module, batches: Sequence[Sequence[Tensor]], device: torch.device) -> TimedCall | None:
    """From the normalised batch on the device to the boxes on the device: backbone, RPN, RoI heads, NMS.

    Args:
        model: a detector with torchvision's transform, in eval mode on `device`.
        batches: as for :func:`end_to_end`; resized and normalised here, outside the timed call.
        device: where the model runs.

    Returns:
        A call that runs batch i, or None for a detector without that transform.
    """
    prepared = Prepared.of(model, [_on_device(batch, device) for batch in batches])
    return None if prepared is None else prepared.run


def backbone_replay(model: nn.Module, batches: Sequence[Sequence[Tensor]], device: torch.device) -> TimedCall | None:
    """Replay of a CUDA graph of the backbone on the first batch: kernel time without any host time.

    RPN and NMS have shapes that depend on the data and cannot be captured, so this is not a latency of the
    detector; beside model-only it tells how much of that is launch overhead.

    Args:
        model: a detector with torchvision's transform and a backbone, in eval mode on `device`.
        batches: as for :func:`end_to_end`; only the first one is used, since a graph has one shape.
        device: a CUDA device.

    Returns:
        A call that replays the graph, or None where there is nothing to capture or capture fails.
    """
    trunk = trunk_of(model)
    prepared = Prepared.of(model, [_on_device(batches[0], device)]) if device.type == "cuda" and trunk else None
    if prepared is None:
        return None
    backbone, images = trunk[0], prepared.batches[0].tensors  # [N, 3, H, W]
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                backbone(images)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backbone(images)
    except RuntimeError:  # a backbone that synchronises or allocates in a way that cannot be captured
        return None
    return lambda index: (images, graph.replay())  # holds on to the graph's input


def check_images(images: Sequence[Tensor]) -> None:
    """Refuse what no detector takes.

    Raises:
        InputError: there is no image, or one is not [3, H, W] in uint8 or a float type.
    """
    if not images:
        raise InputError("images is empty; latency is measured on at least one image [3, H, W]")
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise InputError(
                f"images[{index}] has shape {list(image.shape)} and dtype {image.dtype}; give "
                "[3, H, W] in uint8 or a float type in 0..1"
            )
