"""The three things that are timed of a detector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from jdkd.detect.contract import detections
from jdkd.errors import InputError

TimedCall = Callable[[int], object]
"""Runs a model on batch number i of those it was prepared for."""


class _Prepared(nn.Module):
    """Stands in for a detector's transform: hands out one prepared batch, leaves the detections alone."""

    batch: ImageList

    def forward(self, images: list[Tensor], targets: None = None) -> tuple[ImageList, None]:
        return self.batch, None

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: object) -> list[dict[str, Tensor]]:
        return result


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
        model: a detector with a torchvision `transform`, in eval mode on `device`.
        batches: as for :func:`end_to_end`; resized and normalised here, outside the timed call.
        device: where the model runs.

    Returns:
        A call that runs batch i, or None for a detector without `transform`.
    """
    if not hasattr(model, "transform"):
        return None
    prepared = [_channels_last(model.transform(_on_device(batch, device))[0]) for batch in batches]
    bare = copy.copy(model)
    stand_in = _Prepared().eval()
    bare._modules = {**model._modules, "transform": stand_in}  # the caller's model keeps its own

    def call(index: int) -> list[dict[str, Tensor]]:
        stand_in.batch = prepared[index]
        return bare(list(prepared[index].tensors))

    return call


def backbone_replay(model: nn.Module, batches: Sequence[Sequence[Tensor]], device: torch.device) -> TimedCall | None:
    """Replay of a CUDA graph of the backbone on the first batch: kernel time without any host time.

    RPN and NMS have shapes that depend on the data and cannot be captured, so this is not a latency of the
    detector; beside model-only it tells how much of that is launch overhead.

    Args:
        model: a detector with `transform` and `backbone`, in eval mode on `device`.
        batches: as for :func:`end_to_end`; only the first one is used, since a graph has one shape.
        device: a CUDA device.

    Returns:
        A call that replays the graph, or None where there is nothing to capture or capture fails.
    """
    if device.type != "cuda" or not hasattr(model, "transform") or not hasattr(model, "backbone"):
        return None
    images = _channels_last(model.transform(_on_device(batches[0], device))[0]).tensors  # [N, 3, H, W]
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                model.backbone(images)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.backbone(images)
    except RuntimeError:  # a backbone that synchronises or allocates in a way that cannot be captured
        return None
    return lambda index: (images, graph.replay())  # holds on to the graph's input


def _channels_last(batch: ImageList) -> ImageList:
    """The same batch in the memory format of a deployable model."""
    return ImageList(batch.tensors.contiguous(memory_format=torch.channels_last), batch.image_sizes)


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
