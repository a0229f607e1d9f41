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

from jdkd.functional import elastic_conv2d_levels
from jdkd.ops import elastic_kernels, elastic_levels_kernels
from jdkd.ops.active_channels import Channels
from jdkd.ops.elastic_conv import convolve_by
from jdkd.ops.elastic_levels_kernels import LevelsCall
from jdkd.tune.shapes import DTYPES, LAYOUTS, Shape, name_of, on_backend

# Both ends of every class of elastic_kernels.POSITIONS and WEIGHTS: sides of square images, and active channels.
SIDES = ((8, 22), (24, 63), (66, 180), (184, 184))
WIDTHS = (((8, 8), (24, 40)), ((32, 40), (96, 160)), ((128, 160), (400, 600)), ((512, 600), (512, 600)))
MOST_PRODUCTS = {"cpu": 1.2e9, "cuda": 1e12}  # of one forward; what takes more keeps its default


class Inputs(NamedTuple):
    """An image ``[1, Cin, H, W]``, a shared weight of twice the channels, and the gradient of the result."""

    x: Tensor
    weight: Tensor
    dout: Tensor


def kernels(device: torch.device, quick: bool) -> Iterator[Shape]:
    """All regions of :func:`jdkd.ops.elastic_kernels.region` at stride 1, by both of their ends."""
    dtypes = DTYPES[device.type][: 1 if quick else None]
    for sides, widths in itertools.product(SIDES, WIDTHS):
        for dtype, layout, taps in itertools.product(dtypes, reversed(LAYOUTS), (1, 3)):
            ends = dict.fromkeys(zip(sides, widths, strict=True))
            if all(side**2 * math.prod(width) * taps**2 <= MOST_PRODUCTS[device.type] for side, width in ends):
                for side, width in ends:
                    for both in (True, False):
                        yield of_kernels(device, dtype, layout, taps, (side, side), width, both)


def of_kernels(
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
    taps: int,
    size: tuple[int, int],
    width: tuple[int, int],
    both: bool,
) -> Shape:
    """A convolution with half of a shared weight's channels, at stride 1.

    Args:
        device, dtype, layout: of the image.
        taps: 1 or 3, in both directions.
        size: of the image, in pixels.
        width: active channels, of the image and of the result.
        both: whether gradients are computed, too.
    """
    inputs, outputs = width
    image = torch.empty(1, inputs, *size, dtype=dtype, device="meta").contiguous(memory_format=layout)
    call = elastic_kernels.call_of(image, *map(Channels, width), (taps, taps), 1, taps // 2, 1, 1)
    run = partial(_convolved, both)
    runs = {row.name: partial(run, row.name) for row in elastic_kernels.KERNELS}
    return Shape(
        elastic_kernels.TABLE,
        call._replace(product=call.product._replace(device=device, dtype=dtype)),
        f"{inputs}->{outputs} channels, {size[0]}x{size[1]}, {'both ways' if both else 'forward'}",
        partial(_drawn, width, taps, size, dtype, layout, device),
        {name: on_backend("triton", one) if name in TRITON else one for name, one in runs.items()},
    )


TRITON = [row.name for row in elastic_kernels.KERNELS if row.kernel]


def _drawn(
    width: tuple[int, int],
    taps: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
) -> Inputs:
    inputs, outputs = width
    x = torch.randn(1, inputs, *size, device=device).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(2 * outputs, 2 * inputs, taps, taps, device=device).to(dtype)
    dout = torch.randn(1, outputs, *size, device=device).to(dtype).contiguous(memory_format=layout)
    return Inputs(x.requires_grad_(), weight.contiguous(memory_format=layout).requires_grad_(), dout)


def _convolved(both: bool, name: str, given: Inputs) -> Any:
    x, weight, dout = given
    taps = (weight.shape[2], weight.shape[3])
    width = Channels(x.shape[1]), Channels(dout.shape[1])
    if name != "aten":  # where a measurement takes another way, the way is looked up
        elastic_kernels.name_of(x, *width, taps, 1, taps[0] // 2, 1, 1)
    with torch.set_grad_enabled(both):
        y = convolve_by(name, x, weight, None, *width, 1, (taps[0] // 2, taps[1] // 2), 1, 1)
    return torch.autograd.grad(y, (x, weight), dout) if both else y


def levels(device: torch.device, quick: bool) -> Iterator[Shape]:
    """Five levels of a pyramid, 3x3, forward alone."""
    if device.type != "cuda":
        return
    for dtype in DTYPES["cuda"][: 1 if quick else None]:
        for channels, side in ((64, 16), (128, 32), (256, 32), (256, 96), (256, 168)):
            sizes = [(1, channels, max(1, side >> level), max(1, side >> level)) for level in range(5)]
            xs = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
            runs = {elastic_levels_kernels.OP: on_backend("triton", _of_levels), "aten": _of_levels}
            yield Shape(
                elastic_levels_kernels.TABLE,
                LevelsCall(xs, (3, 3), (1, 1)),
                f"{channels} channels, {side}x{side} and four levels more, {name_of(dtype)}",
                partial(_drawn_levels, sizes, dtype, device),
                runs,
            )


def _drawn_levels(sizes: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device) -> Any:
    channels = sizes[0][1]
    last = {"memory_format": torch.channels_last}
    xs = [torch.randn(size, device=device).to(dtype).contiguous(**last) for size in sizes]
    return xs, torch.randn(2 * channels, 2 * channels, 3, 3, device=device).to(dtype).contiguous(**last)


def _of_levels(given: Any) -> Any:
    xs, weight = given
    with torch.no_grad():
        return elastic_conv2d_levels(xs, weight, in_channels=xs[0].shape[1], out_channels=xs[0].shape[1], padding=1)
