"""Elastic convolution: a convolution with the active channels of a shared weight.

Two routes. **Composed** (the default): the active part of the weight, see :mod:`jdkd.ops.active_channels`,
under ATen's own convolution and autograd. **Operators**: ``jdkd::elastic_conv_fwd`` and ``_bwd``, opaque to
the compiler, under one ``autograd.Function``; the forward may run a Triton kernel that reads the shared
weight in place.

The composed route is the default because it measured fastest: on two CPU cores, forward + backward at half
width, a
Function around the operators costs 80 microseconds a call more (16 of 32 channels, 3x3, 16x16, batch 8: 0.46
ms against 0.38), and gains nothing at a large weight once the slice has the one-pass gradient of
``active_part`` (256 of 512 channels, 7x7: 2.0 ms and 1.9 ms, where two slices take 4.6). The kernel has not
been timed on a GPU, so there it is asked for with ``JDKD_BACKEND=triton`` or ``use_backend("triton")``; cuDNN
is the default.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.ops.active_channels import (
    Channels,
    ChannelsLike,
    Kernel,
    active_channels,
    active_part,
    crop,
    gather,
    on_device,
    scatter,
)
from jdkd.ops.kernel_size import KernelLike, active_kernel, active_padding, pair

_OP = "elastic_conv"
_Pair = Sequence[int]  # vertical, horizontal, in pixels
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_backend.register(_OP, "reference", why="ATen on the active part of the weight: cuDNN, oneDNN")
_backend.register(_OP, "triton", dtypes=_TRITON_DTYPES, why="only on request, since it has not been timed on a GPU yet")


def elastic_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_channels: ChannelsLike = None,
    out_channels: ChannelsLike = None,
    kernel_size: KernelLike = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves slim activations with the active channels of a shared weight.

    Gradients reach the active part only and are exactly zero elsewhere; several subnets may share the weight
    in one graph. A grouped convolution keeps whole groups, the same ones on both sides, and one of
    ``in_channels`` and ``out_channels`` may be left out; lists of groups are for depthwise convolutions.

    Args:
        x: ``[N, Cin, H, W]`` (or ``[Cin, H, W]``), the active input channels only, in the order of
            ``in_channels``.
        weight: shared weight, ``[Cout_max, Cin_max / groups, kh, kw]``.
        bias: shared bias, ``[Cout_max]``, or None.
        in_channels: active input channels: None (all), the number of leading ones, or a list or 1-D integer
            tensor of distinct indices. Keep tensors on the device of the weight; a list costs a transfer at
            every call.
        out_channels: active output channels, likewise.
        kernel_size: active centre of the kernel, in taps, of the same parity; None: all of it.
        stride: step of the window, in pixels.
        padding: zeros on each side of the image under the whole kernel, in pixels, or ``"same"`` or ``"valid"``. A
            smaller kernel takes as many pixels less, so that outputs stay in place.
        dilation: distance between taps, in pixels.
        groups: groups of the whole convolution.

    Returns:
        ``[N, Cout, OH, OW]``: the active output channels, in the order of ``out_channels``.

    Raises:
        InputError: if the channels or the kernel do not fit the weight, or ``x`` does not have the channels.

    Source:
        Leading channels and centres of one shared weight: Cai et al., Once-for-All, ICLR 2020, section 3.2.
    """
    inputs, outputs, active_groups = conv_channels(weight, groups, in_channels, out_channels)
    kernel = active_kernel(kernel_size, weight.shape[2:])
    padding = active_padding(kernel, weight.shape[2:], padding, dilation)
    check_channels(x, inputs.count, dim=-3, where="elastic_conv2d")
    return convolve(x, weight, bias, inputs, outputs, stride, padding, dilation, active_groups, kernel)


def conv_channels(
    weight: Tensor, groups: int, in_channels: ChannelsLike, out_channels: ChannelsLike
) -> tuple[Channels, Channels, int]:
    """Reads the active channels of a convolution.

    Args:
        weight: ``[Cout_max, Cin_max / groups, kh, kw]``.
        groups: groups of the whole convolution.
        in_channels: active input channels as given by the user.
        out_channels: active output channels as given by the user.

    Returns:
        Active input channels, active output channels, active groups.

    Raises:
        InputError: see :func:`elastic_conv2d`.
    """
    out_maximum, per_group = weight.shape[:2]
    if groups == 1:
        inputs = active_channels(in_channels, per_group, "in_channels")
        return inputs, active_channels(out_channels, out_maximum, "out_channels"), 1
    ins = _active_groups(in_channels, per_group, groups, "in_channels")
    outs = _active_groups(out_channels, out_maximum // groups, groups, "out_channels")
    if in_channels is None or out_channels is None:
        kept = outs if in_channels is None else ins
    elif not _same(ins, outs):
        raise InputError(
            f"in_channels keeps {ins.count} and out_channels {outs.count} of {groups} groups, or not the "
            "same ones; give one of the two and leave the other out"
        )
    else:
        kept = ins
    rows = out_maximum // groups  # per group
    index = kept.index
    if index is not None and rows > 1:
        index = (index[:, None] * rows + torch.arange(rows, device=index.device)).flatten()
    return Channels(kept.count * per_group), Channels(kept.count * rows, index), kept.count


def _active_groups(value: ChannelsLike, per_group: int, groups: int, argument: str) -> Channels:
    """Reads active channels as the groups they make up."""
    channels = active_channels(value, per_group * groups, argument)
    if per_group == 1:
        return channels
    if channels.index is not None:
        raise InputError(
            f"{argument} is a list but the convolution has {groups} groups of {per_group} channels; give "
            "the number of leading channels (lists are for depthwise convolutions and for groups=1)"
        )
    if channels.count % per_group:
        raise InputError(
            f"{argument}={channels.count} cuts through a group of {per_group} channels "
            f"(groups={groups}); give a multiple of {per_group}"
        )
    return Channels(channels.count // per_group)


def _same(a: Channels, b: Channels) -> bool:
    if a.index is None or b.index is None or a.index is b.index:
        return a.count == b.count and a.index is b.index
    on_host = a.index.device.type == b.index.device.type == "cpu"
    return on_host and a.count == b.count and bool(torch.equal(a.index, b.index))


def check_channels(x: Tensor, count: int, *, dim: int, where: str) -> None:
    """Raises InputError unless dimension ``dim`` of ``x`` holds ``count`` active channels."""
    if x.shape[dim] != count:
        raise InputError(
            f"{where}: x has {x.shape[dim]} channels but {count} input channels are active; activate as many as x has"
        )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Channels,
    outputs: Channels,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    kernel: Kernel = None,
) -> Tensor:
    """Convolves with channels that have been read already.

    Args:
        x: ``[N, Cin, H, W]``.
        weight: ``[Cout_max, Cin_max / groups of the whole convolution, kh, kw]``.
        bias: ``[Cout_max]`` or None.
        inputs: active input channels.
        outputs: active output channels.
        stride: in pixels.
        padding: of the active kernel, in pixels, or ``"same"`` or ``"valid"``.
        dilation: in pixels.
        groups: active groups.
        kernel: active centre of the kernel; None: all of it.

    Returns:
        ``[N, Cout, OH, OW]``.
    """
    if groups == 1 and x.dim() == 4 and padding != "same" and _kernel_runs(x):
        x = _autocast(x)
        window = pair(stride), pair(0 if padding == "valid" else padding), pair(dilation)
        weight = crop(weight, kernel)
        return _ElasticConv.apply(x, weight, bias, inputs.index, outputs.index, outputs.count, *window, groups)
    columns = inputs if groups == 1 else Channels(weight.shape[1])
    part = active_part(weight, outputs, columns, kernel)  # [Cout, Cin / groups, kh, kw]
    bias = None if bias is None else active_part(bias, outputs)  # [Cout]
    return F.conv2d(x, part, bias, stride, padding, dilation, groups)


def _autocast(x: Tensor) -> Tensor:
    """Casts as autocast does before a convolution; the kernel casts the weight."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _kernel_runs(x: Tensor) -> bool:
    """Whether the Triton kernel was asked for and takes ``x``; a compiled graph keeps its first answer."""
    if x.device.type not in ("cuda", "cpu"):
        return False
    if torch.compiler.is_compiling():
        return _selected(x.device.type, x.dtype) == "triton"
    return _backend.select(_OP, x) == "triton"


def _selected(device: str, dtype: torch.dtype) -> str:
    return _backend.select(_OP, torch.empty(0, device=device, dtype=dtype))


# What torch.compiler.assume_constant_result sets; calling that would load the whole compiler, and triton with it.
_selected._dynamo_marked_constant = True


class _ElasticConv(torch.autograd.Function):
    """The autograd rule around the operators; index lists are saved with the forward, not looked up again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None,
        out_index: Tensor | None, out_channels: int, stride: tuple[int, int], padding: tuple[int, int],
        dilation: tuple[int, int], groups: int,
    ) -> Tensor:  # fmt: skip
        in_index, out_index = on_device(in_index, x.device), on_device(out_index, x.device)
        ctx.save_for_backward(x, weight, in_index, out_index)
        ctx.has_bias, ctx.window = bias is not None, (out_channels, stride, padding, dilation, groups)
        return torch.ops.jdkd.elastic_conv_fwd(x, weight, bias, in_index, out_index, *ctx.window)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, in_index, out_index = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        grads = torch.ops.jdkd.elastic_conv_bwd(dout, x, weight, in_index, out_index, *ctx.window, wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 7


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "elastic_conv_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? out_index, "
    "SymInt out_channels, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "elastic_conv_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? in_index, Tensor? out_index, "
    "SymInt out_channels, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _rows_columns(
    x: Tensor,
    weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    out_channels: int,
    groups: int,
) -> tuple[Channels, Channels]:
    columns = Channels(x.shape[1], in_index) if groups == 1 else Channels(weight.shape[1])
    return Channels(out_channels, out_index), columns


def _layout(x: Tensor) -> torch.memory_format:
    """The dense layout of a result: channels-last where ``x`` is nothing else."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_output(
    x: Tensor, weight: Tensor, out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    reach = [dilation[d] * (weight.shape[2 + d] - 1) + 1 for d in (0, 1)]  # of the window, in pixels
    size = [(x.shape[2 + d] + 2 * padding[d] - reach[d]) // stride[d] + 1 for d in (0, 1)]
    shape = (x.shape[0], out_channels, *size)  # [N, Cout, OH, OW]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int,
) -> Tensor:  # fmt: skip
    if groups == 1 and _backend.select(_OP, x) == "triton":
        y = _empty_output(x, weight, out_channels, stride, padding, dilation)
        if y.numel() // max(1, out_channels) < 2**31:
            return _forward_triton(x, weight, bias, y, in_index, out_index, stride, padding, dilation)
    rows, columns = _rows_columns(x, weight, in_index, out_index, out_channels, groups)
    part = gather(weight, rows, columns).to(x.dtype)  # [Cout, Cin / groups, kh, kw]
    bias = None if bias is None else gather(bias, rows, Channels(1)).to(x.dtype)  # [Cout]
    y = torch.ops.aten.convolution(x, part, bias, stride, padding, dilation, False, [0, 0], groups)
    return y.contiguous(memory_format=_layout(x))


def _forward_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    stride: _Pair, padding: _Pair, dilation: _Pair,
) -> Tensor:  # fmt: skip
    from jdkd.kernels.elastic_conv import elastic_conv_fwd

    if y.numel() > 0:
        allow_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
        elastic_conv_fwd(x, weight, bias, y, in_index, out_index, stride, padding, dilation, allow_tf32)
    return y


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int,
) -> Tensor:  # fmt: skip
    return _empty_output(x, weight, out_channels, stride, padding, dilation)


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = _rows_columns(x, weight, in_index, out_index, out_channels, groups)
    part = gather(weight, rows, columns).to(x.dtype)  # [Cout, Cin / groups, kh, kw]
    dx, dpart, dbias = torch.ops.aten.convolution_backward(
        dout, x, part, [out_channels], stride, padding, dilation, False, [0, 0], groups, wanted
    )
    empty = weight.new_empty
    return (
        dx.contiguous(memory_format=_layout(x)) if wanted[0] else x.new_empty(0),
        scatter(dpart, weight, rows, columns) if wanted[1] else empty(0),
        scatter(dbias, empty(weight.shape[0]), rows, Channels(1)) if wanted[2] else empty(0),
    )


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    return (
        dx if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


_library.impl("elastic_conv_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("elastic_conv_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::elastic_conv_fwd", _forward_fake, lib=_library)
torch.library.register_fake("jdkd::elastic_conv_bwd", _backward_fake, lib=_library)
