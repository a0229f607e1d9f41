"""What the kernels of elastic convolutions are held to on the device at hand, against ATen in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd._verdicts import ALLOWED, Compared
from jdkd.ops.active_channels import Channels
from jdkd.reference import elastic_pointwise as pointwise_reference

_TF32 = 2.0**-8  # allowed where products are rounded to TF32, 2^-11 each
# Shared and active output and input channels, image, stride of a 1x1: odd sizes, whole vectors read in place.
_POINTWISE = (
    ((40, 37), (21, 13), (2, 7, 5), 1),
    ((64, 64), (32, 48), (2, 9, 16), 2),
    ((128, 64), (128, 64), (1, 16, 16), 1),
)
_EPILOGUES = (("none", False), ("relu", True), ("relu_then_add", True))  # activation, and whether with a residual


def precisions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[bool, float, str]]:
    """Yields: whether products may be rounded to TF32, the error that is allowed then, and this in words."""
    yield False, ALLOWED[dtype], ""
    if dtype == torch.float32 and device.type == "cuda":
        yield True, _TF32, ", TF32"


def _drawer(device: torch.device) -> Callable[..., Tensor]:
    """A function that draws a tensor: channels-last if it has four dimensions and not ``plain``."""
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(shape: Sequence[int], dtype: torch.dtype, plain: bool = False) -> Tensor:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
        layout = torch.channels_last if len(shape) == 4 and not plain else torch.contiguous_format
        return values.to(device, dtype).contiguous(memory_format=layout)

    return drawn


def pointwise_forward(run: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function with the signature of ``jdkd::elastic_pointwise_fwd`` and ``allow_tf32``."""
    for tf32, allowed, words in precisions(device, dtype):
        drawn = _drawer(device)
        for shared, (rows, columns), (n, *size), stride in _POINTWISE:
            x, weight = drawn((n, columns, *size), dtype), drawn(shared, dtype)
            total = pointwise_reference.elastic_pointwise(x.double(), weight.double(), out_channels=rows, stride=stride)
            what = f"{columns} -> {rows} of {shared} channels, stride {stride}{words}"
            for activation, has_residual in _EPILOGUES:
                scale, shift = drawn((rows,), torch.float32), drawn((rows,), torch.float32)
                residual = drawn(total.shape, dtype) if has_residual else None
                y, _ = run(x, weight, scale, shift, residual, rows, stride, activation, False, tf32)
                given = scale.double(), shift.double(), None if residual is None else residual.double()
                exact = pointwise_reference.epilogue(total, *given, activation)
                yield Compared(f"{what}, {activation}", y, exact, allowed=allowed)
            y, moments = run(x, weight, None, None, None, rows, stride, "none", True, tf32)
            yield Compared(f"{what}, statistics", y, total, allowed=allowed)
            narrow = max(allowed if tf32 else 0, ALLOWED[torch.float32])
            yield Compared(f"moments, {what}", moments, pointwise_reference.moments(total), allowed=narrow)


def pointwise_gradient(run: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function with the signature of ``jdkd::elastic_pointwise_bwd`` and ``allow_tf32``."""
    for tf32, allowed, words in precisions(device, dtype):
        drawn = _drawer(device)
        for shared, (rows, columns), (n, *size), stride in _POINTWISE:
            x, weight = drawn((n, columns, *size), dtype), drawn(shared, dtype)
            dout = drawn((n, rows, *[(pixels - 1) // stride + 1 for pixels in size]), dtype)
            what = f"{columns} -> {rows} of {shared} channels, stride {stride}{words}"
            dx, dweight = run(dout, x, weight, stride, [True, True], tf32)
            seen, wide = x.double()[:, :, ::stride, ::stride], dout.double()
            active = weight.double()[:rows, :columns]
            exact_dx, exact_dweight = torch.zeros_like(x.double()), torch.zeros_like(weight.double())
            exact_dx[:, :, ::stride, ::stride] = torch.einsum("nohw,oc->nchw", wide, active)
            exact_dweight[:rows, :columns] = torch.einsum("nohw,nchw->oc", wide, seen)
            yield Compared(f"dx, {what}", dx, exact_dx, allowed=allowed)
            yield Compared(f"dweight, {what}", dweight, exact_dweight, allowed=allowed)


# Shared and active channels (a list, or leading ones), image, taps, stride, padding, dilation; both layouts of each.
_CONVOLUTIONS = (
    ((24, 19), 13, 11, (2, 7, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((64, 32), 48, 32, (1, 16, 16), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((20, 16), (3, 0, 17, 9), (5, 2, 11), (2, 9, 6), (3, 1), (1, 2), (2, 0), (2, 1)),
)


def convolution(run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function of ``x, weight, bias, shape, in_index, out_index, stride, padding, dilation, allow_tf32``."""
    for tf32, allowed, words in precisions(device, dtype):
        drawn = _drawer(device)
        for (whole, whole_in), outs, ins, (n, *size), taps, *window in _CONVOLUTIONS:
            weight, bias = drawn((whole, whole_in, *taps), dtype), drawn((whole,), torch.float32)
            (rows, out_index), (columns, in_index) = _picked(outs, device), _picked(ins, device)
            part = weight.double()[rows][:, columns]
            for plain in (False, True):
                x = drawn((n, len(columns), *size), dtype, plain)
                exact = F.conv2d(x.double(), part, bias.double()[rows], *window)
                y = run(x, weight, bias, exact.shape, in_index, out_index, *window, tf32)
                what = f"{tuple(x.shape)}, {'contiguous' if plain else 'channels-last'}, {taps} taps{words}"
                yield Compared(what, y, exact, allowed=allowed)


def _picked(active: int | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Active channels, and the list of them if they are no leading ones."""
    if isinstance(active, int):
        return torch.arange(active, device=device), None
    listed = torch.tensor(active, dtype=torch.int64, device=device)
    return listed, listed


def levels(run: Callable[..., None], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function that fills ``ys``: of ``xs, weight, bias, ys, rows, columns, kernel, padding, relu, tf32``."""
    for tf32, allowed, words in precisions(device, dtype):
        drawn = _drawer(device)
        for shared, rows, columns, taps in (((40, 24), 21, 13, (3, 3)), ((64, 64), 48, 64, (3, 3))):
            weight, bias = drawn((*shared, *taps), dtype), drawn((rows,), torch.float32)
            xs = [drawn((2, columns, *size), dtype) for size in ((16, 13), (8, 7), (4, 4), (2, 2), (1, 1))]
            ys = [drawn((2, rows, *x.shape[2:]), dtype) for x in xs]  # written over
            run(xs, weight, bias, ys, Channels(rows), Channels(columns), taps, (1, 1), True, tf32)
            part = weight.double()[:rows, :columns]
            for x, y in zip(xs, ys, strict=True):
                exact = F.conv2d(x.double(), part, bias.double(), padding=1).relu()
                what = f"level {tuple(x.shape)}, {rows} of {shared[0]} filters{words}"
                yield Compared(what, y, exact, allowed=allowed)
