"""Elastic 3x3 convolution of one pyramid level at four widths, against what else could be done about a width.

The level is P3 of an 800x1344 image, 256 channels, two images, channels-last. ``mask_multiply`` runs the full
convolution on masked weights, ``slice_contiguous`` copies the active weights at every call, ``exported`` is the plain
``nn.Conv2d`` of the subnet: the bar. On a GPU ``ours_triton`` is the kernel that reads the shared weight in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd._backend import use_backend
from jdkd.nn import ElasticConv2d

NAME = "elastic_conv"
CHANNELS = 256


@dataclass(frozen=True)
class Shape:
    """One level at one width; ``listed`` takes every other channel first instead of the leading ones."""

    label: str
    width: float
    listed: bool = False
    batch: int = 2
    height: int = 100
    image_width: int = 168

    @property
    def active(self) -> int:
        return int(CHANNELS * self.width)

    @property
    def channels(self) -> int | list[int]:
        return [*range(0, CHANNELS, 2), *range(1, CHANNELS, 2)][: self.active] if self.listed else self.active


SHAPES = [Shape(f"P3 x{width:g}", width) for width in (1, 0.75, 0.5, 0.25)]
SHAPES.append(Shape("P3 x0.5 listed", 0.5, listed=True))


@dataclass(frozen=True)
class Inputs:
    """What the providers share: the slim image, the same image in full width, and the supernet's layer."""

    slim: Tensor  # [N, C, H, W]
    full: Tensor  # [N, CHANNELS, H, W], zero where inactive
    layer: ElasticConv2d
    mask: Tensor  # [CHANNELS]
    rows: Tensor  # [C] indices of the active channels


def inputs(shape: Shape, device: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Inputs:
    """Draws the inputs of one shape, everything channels-last."""
    torch.manual_seed(seed)
    layer = ElasticConv2d(CHANNELS, CHANNELS, 3, padding=1, device=device, dtype=dtype)
    layer.to(memory_format=torch.channels_last).set_active(shape.channels, shape.channels)
    listed = isinstance(shape.channels, list)
    rows = torch.tensor(shape.channels if listed else range(shape.active), device=device)
    size = shape.batch, CHANNELS, shape.height, shape.image_width
    full = torch.zeros(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    full[:, rows] = torch.randn(size[0], shape.active, *size[2:], device=device, dtype=dtype)
    mask = torch.zeros(CHANNELS, device=device, dtype=dtype).index_fill_(0, rows, 1)
    slim = full[:, rows].contiguous(memory_format=torch.channels_last)
    return Inputs(slim.requires_grad_(), full.requires_grad_(), layer, mask, rows)


def providers(given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The competitors, the eager baseline first; each returns ``[N, C, H, W]``, or ``[N, CHANNELS, H, W]`` masked."""
    layer, mask, rows = given.layer, given.mask, given.rows
    exported = layer.export().to(memory_format=torch.channels_last)
    pair = mask[:, None, None, None] * mask[None, :, None, None]  # [CHANNELS, CHANNELS, 1, 1]
    count = len(rows)
    leading = layer.in_channels_index is None

    def mask_multiply() -> Tensor:
        return F.conv2d(given.full, layer.weight * pair, layer.bias * mask, padding=1)

    def slice_contiguous() -> Tensor:
        if leading:
            weight, bias = layer.weight[:count, :count].contiguous(), layer.bias[:count]
        else:
            weight, bias = layer.weight.index_select(0, rows).index_select(1, rows), layer.bias.index_select(0, rows)
        return F.conv2d(given.slim, weight, bias, padding=1)

    def ours_triton() -> Tensor:
        with use_backend("triton"):
            return layer(given.slim)

    found = {
        "mask_multiply": mask_multiply,
        "slice_contiguous": slice_contiguous,
        "exported": lambda: exported(given.slim),
        "ours": lambda: layer(given.slim),
    }
    return found | {"ours_triton": ours_triton} if given.slim.is_cuda else found


def active_part(given: Inputs, output: Tensor) -> Tensor:
    """The part of a provider's output that all of them must agree on, ``[N, C, H, W]``."""
    return output if output.shape[1] == len(given.rows) else output[:, given.rows]


def least_bytes(shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a forward that reads and writes everything active once."""
    pixels = shape.batch * shape.height * shape.image_width
    return dtype.itemsize * (2 * pixels * shape.active + 9 * shape.active**2 + shape.active)


def flops(shape: Shape) -> int:
    """Floating-point operations of a forward, two for a multiply-add."""
    return 2 * 9 * shape.active**2 * shape.batch * shape.height * shape.image_width
