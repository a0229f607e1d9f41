"""Elastic convolution of all levels of a pyramid with one shared weight, as the heads on P3 to P7 do it.

Two routes, as in :mod:`jdkd.ops.elastic_conv`. **Composed** (the default): the active part of the weight is taken,
cast and laid out once for all levels, ATen convolves level by level, and autograd adds the gradients of the levels
while they are slim. **Operators**: ``jdkd::elastic_levels_fwd`` and ``_bwd``, opaque to the compiler, under one
``autograd.Function``; the forward may be one launch of a Triton kernel for all levels. Either way one dense gradient
reaches the shared weight, however many levels there are.

The kernel has not been timed on a GPU, so it runs where it is asked for (``JDKD_BACKEND=triton``,
``use_backend("triton")``), or where `jdkd tune` found it faster. The gradients are ATen's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jdkd import _backend
from jdkd.ops import elastic_check
from jdkd.ops.active_channels import Channels, ChannelsLike, Kernel, active_part, gather, on_device, scatter
from jdkd.ops.elastic_conv import check_weight, conv_channels
from jdkd.ops.elastic_kernels import allow_tf32, dtype_of
from jdkd.ops.elastic_levels_kernels import (
    OP,
    check_levels,
    empty_outputs,
    kernel_runs,
    pixels_of,
)
from jdkd.ops.kernel_size import KernelLike, Padding, active_kernel, active_padding, pair
from jdkd.ops.layout import channels_last, empty_channels_last, layout_of
from jdkd.ops.onednn_workaround import conv2d_gradients

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def elastic_conv2d_levels(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_channels: ChannelsLike = None,
    out_channels: ChannelsLike = None,
    kernel_size: KernelLike = None,
    padding: Padding = 0,
    activation: str = "none",
) -> list[Tensor]:
    """Convolves all levels of a pyramid with the active channels of one shared weight, at stride 1.

    Equal to ``[elastic_conv2d(x, weight, bias, ...) for x in xs]`` with the activation behind it. The weight gets one
    gradient, the sum over levels, exactly zero outside the active part.

    Args:
        xs: levels ``[N, Cin, H, W]``, the active input channels only, of one dtype on one device; sizes may differ.
        weight: shared weight, ``[Cout_max, Cin_max, kh, kw]``, cast to the dtype of ``xs``.
        bias: shared bias, ``[Cout_max]``, or None.
        in_channels: active input channels: None (all), the number of leading ones, or a list or 1-D integer tensor of
            distinct indices.
        out_channels: active output channels, likewise.
        kernel_size: active centre of the kernel, in taps, of the same parity; None: all of it.
        padding: zeros on each side of every image under the whole kernel, in pixels, or ``"same"`` or ``"valid"``. A
            smaller kernel takes as many pixels less.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        Levels ``[N, Cout, OH, OW]``, in the order of ``xs``.

    Raises:
        InputError: if there is no level, levels differ in dtype or device, or channels, kernel or padding do not fit.

    Source:
        Heads shared by all levels: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4; leading
        channels of one shared weight: Cai et al., Once-for-All, ICLR 2020, section 3.2.
    """
    check_weight(weight, bias)
    inputs, outputs, _ = conv_channels(weight.shape, 1, in_channels, out_channels)
    kernel = active_kernel(kernel_size, weight.shape[2:])
    padding = active_padding(kernel, weight.shape[2:], padding, 1)
    return convolve_levels(xs, weight, bias, inputs, outputs, padding, kernel, activation)


def convolve_levels(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    inputs: Channels,
    outputs: Channels,
    padding: Padding,
    kernel: Kernel,
    activation: str,
) -> list[Tensor]:
    """Convolves with channels that have been read already; see :func:`elastic_conv2d_levels`.

    Args:
        xs: levels ``[N, Cin, H, W]``.
        weight, bias, inputs, outputs, padding, kernel: as of :func:`jdkd.ops.elastic_conv.convolve`, of one group.
        activation: one of :data:`jdkd.ops.elastic_levels_kernels.ACTIVATIONS`.

    Returns:
        Levels ``[N, Cout, OH, OW]``.
    """
    size = kernel or (weight.shape[2], weight.shape[3])
    pixels = pixels_of(padding, size)
    check_levels(xs, weight.device, inputs.count, size, pixels, activation)
    xs = [x.to(dtype_of(x)) for x in xs]
    relu = activation == "relu"
    if kernel_runs(xs, size, pixels):
        lists = on_device(inputs.index, weight.device), on_device(outputs.index, weight.device)
        return list(_ElasticLevels.apply(weight, bias, *lists, outputs.count, size, pixels, relu, *xs))
    part = active_part(weight, outputs, inputs, kernel).to(xs[0].dtype)  # [Cout, Cin, kh, kw]
    if len(xs) > 1:  # once, which ATen would do for every level
        part = part.contiguous(memory_format=layout_of(xs[0]))
    if bias is not None:
        bias = active_part(bias, outputs).to(xs[0].dtype)  # [Cout]
    ys = [F.conv2d(x, part, bias, padding=pixels) for x in xs]
    return [y.relu() for y in ys] if relu else ys


class _ElasticLevels(torch.autograd.Function):
    """The autograd rule around the operators: one gradient of the weight for all levels."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
        out_channels: int, kernel: tuple[int, int], padding: tuple[int, int], relu: bool, *xs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        in_index, out_index = (on_device(index, weight.device) for index in (in_index, out_index))
        ctx.has_bias, ctx.relu, ctx.tail = bias is not None, relu, (out_channels, kernel, padding)
        ctx.set_materialize_grads(False)
        ys = torch.ops.jdkd.elastic_levels_fwd(xs, weight, bias, in_index, out_index, *ctx.tail, relu)
        ctx.save_for_backward(weight, in_index, out_index, *xs, *(ys if relu else ()))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, in_index, out_index, *images = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[1]
        needs_xs = ctx.needs_input_grad[8:]
        live = [i for i, dout in enumerate(douts) if dout is not None]  # levels that a loss has seen
        if not live:
            return (None,) * (8 + len(douts))
        xs, used = [images[i] for i in live], [douts[i] for i in live]
        if ctx.relu:  # the sign of the output tells
            ys = [images[len(douts) + i] for i in live]
            used = [torch.ops.aten.threshold_backward(dout, y, 0) for dout, y in zip(used, ys, strict=True)]
        wanted = [any(needs_xs), needs_weight, needs_bias]
        dxs, dweight, dbias = torch.ops.jdkd.elastic_levels_bwd(
            used, xs, weight, in_index, out_index, *ctx.tail, wanted
        )
        of = dict(zip(live, dxs, strict=False))
        return (
            dweight if needs_weight else None, dbias if needs_bias else None, *[None] * 6,
            *(of.get(i) if needed else None for i, needed in enumerate(needs_xs)),
        )  # fmt: skip


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "elastic_levels_fwd(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, "
    "SymInt out_channels, SymInt[2] kernel, SymInt[2] padding, bool relu) -> Tensor[]",
    tags=_TAGS,
)
_library.define(
    "elastic_levels_bwd(Tensor[] douts, Tensor[] xs, Tensor weight, Tensor? in_index, Tensor? out_index, "
    "SymInt out_channels, SymInt[2] kernel, SymInt[2] padding, bool[3] wanted) -> (Tensor[], Tensor, Tensor)",
    tags=_TAGS,
)


def _part(weight: Tensor, rows: Channels, columns: Channels, kernel: Kernel, dtype: torch.dtype) -> Tensor:
    """The active part for ATen, dense channels-last, ``[Cout, Cin, kh, kw]``."""
    return gather(weight, rows, columns, kernel).to(dtype, memory_format=torch.channels_last)


def _forward(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, kernel: Sequence[int], padding: Sequence[int], relu: bool,
) -> list[Tensor]:  # fmt: skip
    rows, columns = Channels(out_channels, out_index), Channels(xs[0].shape[1], in_index)
    bias = None if bias is None else gather(bias, rows, Channels(1))  # [Cout]
    if kernel_runs(xs, kernel, padding):
        xs, ys = [channels_last(x) for x in xs], empty_outputs(xs, out_channels, kernel, padding)
        bias = None if bias is None else bias.contiguous()
        _launch(xs, weight, bias, ys, rows, columns, pair(kernel), pair(padding), relu, allow_tf32())
        return ys
    part = _part(weight, rows, columns, pair(kernel), xs[0].dtype)
    bias = None if bias is None else bias.to(part.dtype)
    ys = [torch.ops.aten.convolution(x, part, bias, [1, 1], padding, [1, 1], False, [0, 0], 1) for x in xs]
    return [channels_last(y.relu_() if relu else y) for y in ys]


def _launch(
    xs: list[Tensor], weight: Tensor, bias: Tensor | None, ys: list[Tensor], rows: Channels, columns: Channels,
    kernel: tuple[int, int], padding: tuple[int, int], relu: bool, allow_tf32: bool,
) -> None:  # fmt: skip
    """Runs the kernel on the weight where it lies, or on a packed copy of its active part."""
    from jdkd.kernels.elastic_levels import Window, elastic_levels_fwd, readable_in_place

    dtype, leading = xs[0].dtype, (Channels(weight.shape[0]), Channels(weight.shape[1]))
    operand = gather(weight, *leading, kernel)  # a view: the centre
    if rows.index is not None or columns.index is not None or not readable_in_place(operand, dtype):
        part = gather(weight, rows, columns, kernel)
        vector = 16 // dtype.itemsize
        width = (columns.count + vector - 1) // vector * vector  # rows of whole 16 bytes
        packed = weight.new_empty((rows.count, *kernel, width), dtype=dtype)[..., : columns.count]
        operand = packed.copy_(part.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    elastic_levels_fwd(
        xs, operand, bias, ys, Window(padding=padding), relu=relu, whole=weight.shape[0], allow_tf32=allow_tf32
    )


def _forward_fake(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, kernel: Sequence[int], padding: Sequence[int], relu: bool,
) -> list[Tensor]:  # fmt: skip
    return empty_outputs(xs, out_channels, kernel, padding)


def _backward(
    douts: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, kernel: Sequence[int], padding: Sequence[int], wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    kernel = (kernel[0], kernel[1])
    rows, columns = Channels(out_channels, out_index), Channels(xs[0].shape[1], in_index)
    part = _part(weight, rows, columns, kernel, xs[0].dtype)
    wide = torch.promote_types(part.dtype, torch.float32)
    dxs: list[Tensor] = []
    dpart: Tensor | None = None
    dbias: Tensor | None = None
    for dout, x in zip(douts, xs, strict=True):
        dx, *sums = conv2d_gradients(dout, x, part, 1, padding, 1, 1, wanted)
        dxs += [] if dx is None or not wanted[0] else [channels_last(dx)]
        dpart, dbias = (
            None if one is None or not want else one.to(wide) if total is None else total.add_(one)
            for total, one, want in zip((dpart, dbias), sums, wanted[1:], strict=True)
        )
    empty = weight.new_empty
    return (
        dxs,
        empty(0) if dpart is None else scatter(dpart, weight, rows, columns, kernel),
        empty(0) if dbias is None else scatter(dbias, empty(weight.shape[0]), rows, Channels(1)),
    )


def _backward_fake(
    douts: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, kernel: Sequence[int], padding: Sequence[int], wanted: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    return (
        [empty_channels_last(x, *x.shape) for x in xs] if wanted[0] else [],
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


_backend.register(OP, "reference", why="ATen level by level on the active part of the weight")
_checks = {"forward": lambda _, *where: elastic_check.levels(_launch, *where)}
_backend.register(
    OP, "triton", dtypes=_TRITON_DTYPES, why="on request, or where `jdkd tune` found it faster", checks=_checks
)
_library.impl("elastic_levels_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("elastic_levels_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::elastic_levels_fwd", _forward_fake, lib=_library)
torch.library.register_fake("jdkd::elastic_levels_bwd", _backward_fake, lib=_library)
