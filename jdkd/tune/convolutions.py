"""Shapes of elastic convolutions: half of a shared weight's channels, the forward alone and both ways, and the levels
of a pyramid in one launch against ATen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdkd._verdicts import dtype_name
from jdkd.functional import elastic_conv2d_levels
from jdkd.ops import elastic_kernels, elastic_levels_kernels
from jdkd.ops.active_channels import Channels
from jdkd.ops.elastic_conv import convolve_by
from jdkd.ops.elastic_levels_kernels import LevelsCall
from jdkd.tune.shapes import DTYPES, LAYOUTS, Shape, on_backend

# Both ends of every class of elastic_kernels.POSITIONS and WEIGHTS: sides of square results, and active channels.
SIDES = ((8, 22), (24, 63), (66, 180), (184, 184))
WIDTHS = (((8, 8), (24, 40)), ((32, 40), (96, 160)), ((128, 160), (400, 600)), ((512, 600), (512, 600)))
MOST_PRODUCTS = {"cpu": 1.2e9, "cuda": 1e12}  # of one forward; what takes more keeps its default
PYRAMIDS = ((64, 16), (128, 32), (256, 32), (256, 48), (256, 96), (256, 168))  # channels, and side of the first level
PREDICTED = 16  # channels that a 1x1 convolution of levels makes, as those do that predict


class Filters(NamedTuple):
    """A kind of convolution that detectors have.

    Args:
        taps: in both directions.
        stride: likewise, in pixels.
        is_listed: whether every other channel is active, and not the leading ones.
        is_depthwise: whether each channel is a group.
    """

    taps: int
    stride: int = 1
    is_listed: bool = False
    is_depthwise: bool = False

    def channels(self, count: int, device: torch.device) -> Channels:
        """So many channels of twice as many."""
        return Channels(count, torch.arange(0, 2 * count, 2, device=device) if self.is_listed else None)

    def window(self, inputs: int) -> tuple[tuple[int, int], int, tuple[int, int], int, int]:
        """Taps, stride, padding, dilation and groups over so many channels."""
        taps, pixels = self.taps, self.taps // 2
        return (taps, taps), self.stride, (pixels, pixels), 1, inputs if self.is_depthwise else 1


LEADING = tuple(Filters(taps, stride) for stride in elastic_kernels.STRIDES for taps in elastic_kernels.TAPS)
DEPTHWISE = Filters(3, is_depthwise=True), Filters(5, 2, is_depthwise=True)


class Inputs(NamedTuple):
    """An image ``[1, Cin, H, W]``, a shared weight of twice the channels, active ones, and the result's gradient."""

    x: Tensor
    weight: Tensor
    inputs: Channels
    outputs: Channels
    dout: Tensor


def kernels(device: torch.device, quick: bool) -> Iterator[Shape]:
    """All regions of :func:`jdkd.ops.elastic_kernels.region`, by both of their ends; the quick ones without lists of
    channels, which neither pools nor searches make."""
    dtypes = DTYPES[device.type][: 1 if quick else None]
    listed = () if quick else tuple(filters._replace(is_listed=True) for filters in LEADING)
    for filters, sides, widths in itertools.product(LEADING + listed, SIDES, WIDTHS):
        ends = dict.fromkeys(zip(sides, widths, strict=True))
        if all(side**2 * math.prod(width) * filters.taps**2 <= MOST_PRODUCTS[device.type] for side, width in ends):
            for dtype, layout in itertools.product(dtypes, reversed(LAYOUTS)):
                for (side, width), both in itertools.product(ends, (True, False)):
                    size = filters.stride * side, filters.stride * side
                    yield of_kernels(device, dtype, layout, filters, size, width, both)
    for dtype, layout, filters in itertools.product(dtypes, LAYOUTS, DEPTHWISE):
        yield of_kernels(device, dtype, layout, filters, (64, 64), (32, 32), True)


def of_kernels(
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
    filters: Filters,
    size: tuple[int, int],
    width: tuple[int, int],
    both: bool,
) -> Shape:
    """A convolution with half of a shared weight's channels.

    Args:
        device, dtype, layout: of the image.
        filters: what kind of convolution.
        size: of the image, in pixels.
        width: active channels, of the image and of the result.
        both: whether gradients are computed, too.
    """
    inputs, outputs = width
    image = torch.empty(1, inputs, *size, dtype=dtype, device="meta").contiguous(memory_format=layout)
    active = [filters.channels(count, image.device) for count in width]
    call = elastic_kernels.call_of(image, *active, *filters.window(inputs))
    runs = {row.name: partial(_convolved, filters, both, row.name) for row in elastic_kernels.KERNELS}
    return Shape(
        elastic_kernels.TABLE,
        call._replace(product=call.product._replace(device=device, dtype=dtype)),
        f"{inputs}->{outputs} channels, {size[0]}x{size[1]}, {'both ways' if both else 'forward'}",
        partial(_drawn, filters, size, width, dtype, layout, device),
        {name: on_backend("triton", one) if name in TRITON else one for name, one in runs.items()},
    )


TRITON = [row.name for row in elastic_kernels.KERNELS if row.kernel]


def _drawn(
    filters: Filters,
    size: tuple[int, int],
    width: tuple[int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
) -> Inputs:
    inputs, outputs = width
    per_group = 1 if filters.is_depthwise else 2 * inputs
    x = torch.randn(1, inputs, *size, device=device).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(2 * outputs, per_group, filters.taps, filters.taps, device=device).to(dtype)
    smaller = [(pixels - 1) // filters.stride + 1 for pixels in size]
    dout = torch.randn(1, outputs, *smaller, device=device).to(dtype).contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=layout).requires_grad_()
    return Inputs(x.requires_grad_(), weight, *(filters.channels(count, device) for count in width), dout)


def _convolved(filters: Filters, both: bool, name: str, given: Inputs) -> Any:
    x, weight, inputs, outputs, dout = given
    taps, *window = filters.window(inputs.count)
    if name != "aten":  # where a measurement takes another way, the way is looked up
        elastic_kernels.name_of(x, inputs, outputs, taps, *window)
    with torch.set_grad_enabled(both):
        y = convolve_by(name, x, weight, None, inputs, outputs, *window)
    return torch.autograd.grad(y, (x, weight), dout) if both else y


class Pyramid(NamedTuple):
    """Levels ``[1, C, H, W]``, a shared weight of twice the channels, and the gradients of the results."""

    xs: list[Tensor]
    weight: Tensor
    douts: list[Tensor]


def levels(device: torch.device, quick: bool) -> Iterator[Shape]:
    """Five levels of a pyramid: 3x3, as in the towers of heads, and the 1x1 of predictions."""
    dtypes = DTYPES[device.type][: 1 if quick else None]
    for dtype, taps, (channels, side), both in itertools.product(dtypes, (3, 1), PYRAMIDS, (True, False)):
        sizes = [(1, channels, max(1, side >> level), max(1, side >> level)) for level in range(5)]
        outputs = PREDICTED if taps == 1 else channels
        run = partial(_of_levels, both)
        yield Shape(
            elastic_levels_kernels.TABLE,
            LevelsCall(
                [torch.empty((), dtype=dtype, device=device).expand(size) for size in sizes],
                (taps, taps),
                (taps // 2, taps // 2),
            ),
            f"{channels}->{outputs} channels, {side}x{side} and four levels more, {dtype_name(dtype)}, "
            f"{'both ways' if both else 'forward'}",
            partial(_drawn_levels, sizes, outputs, taps, dtype, device),
            {elastic_levels_kernels.OP: on_backend("triton", run), "aten": run},
        )


def _drawn_levels(
    sizes: list[tuple[int, int, int, int]], outputs: int, taps: int, dtype: torch.dtype, device: torch.device
) -> Pyramid:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    xs = [drawn(*size).requires_grad_() for size in sizes]
    weight = drawn(2 * outputs, 2 * sizes[0][1], taps, taps).requires_grad_()
    return Pyramid(xs, weight, [drawn(1, outputs, *size[2:]) for size in sizes])


def _of_levels(both: bool, given: Pyramid) -> Any:
    xs, weight, douts = given
    channels = {"in_channels": xs[0].shape[1], "out_channels": douts[0].shape[1]}
    with torch.set_grad_enabled(both):
        ys = elastic_conv2d_levels(xs, weight, **channels, padding=weight.shape[2] // 2)
    return torch.autograd.grad(ys, [*xs, weight], douts) if both else ys
