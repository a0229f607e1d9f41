"""Elastic convolution: a convolution with the active channels of a shared weight.

The usual path is ATen's own convolution and autograd on the active part of the weight, see
:mod:`jdkd.ops.active_channels`. It measured fastest: on two CPU cores, forward + backward at half width, a Function
around operators of our own costs 80 microseconds a call more (16 of 32 channels, 3x3, 16x16, batch 8: 0.46 ms against
0.38), and gains nothing at a large weight once the slice has the one-pass gradient of ``active_part`` (256 of 512
channels, 7x7: 2.0 ms and 1.9 ms, where two slices take 4.6). :mod:`jdkd.ops.elastic_kernels` holds the table of
all kernels, and when another one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.errors import InputError
from jdkd.ops import elastic_kernels
from jdkd.ops.active_channels import (
    Channels,
    ChannelsLike,
    Kernel,
    active_channels,
    active_part,
    crop,
)
from jdkd.ops.elastic_implicit_gemm import implicit_gemm
from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d
from jdkd.ops.kernel_size import KernelLike, Padding, active_kernel, active_padding, pair
from jdkd.ops.onednn_workaround import conv2d


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
    _check_tensors(x, weight, bias)
    inputs, outputs, active_groups = conv_channels(weight.shape, groups, in_channels, out_channels)
    kernel = active_kernel(kernel_size, weight.shape[2:])
    around = active_padding(kernel, weight.shape[2:], padding, dilation)
    check_channels(x, inputs.count, dim=-3, where="elastic_conv2d")
    return convolve(x, weight, bias, inputs, outputs, stride, around, dilation, active_groups, kernel)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises InputError on what is no image, shared weight and shared bias."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x is {kind}; give a floating tensor [N, Cin, H, W]")
    check_weight(weight, bias)
    if x.device != weight.device:
        raise InputError(f"x is on {x.device} and weight on {weight.device}; move one of them")


def check_weight(weight: Tensor, bias: Tensor | None) -> None:
    """Raises InputError unless they are ``[Cout_max, Cin_max / groups, kh, kw]`` and None or ``[Cout_max]``."""
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        kind = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"weight is {kind}; give the shared weight [Cout_max, Cin_max / groups, kh, kw]")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        what = f"has shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else f"is a {type(bias).__name__}"
        raise InputError(f"bias {what}; give the shared bias of all {weight.shape[0]} outputs")


def conv_channels(
    shape: Sequence[int], groups: int, in_channels: ChannelsLike, out_channels: ChannelsLike
) -> tuple[Channels, Channels, int]:
    """Reads the active channels of a convolution.

    Args:
        shape: of the shared weight: ``Cout_max``, ``Cin_max / groups`` and what follows.
        groups: groups of the whole convolution.
        in_channels: active input channels as given by the user.
        out_channels: active output channels as given by the user.

    Returns:
        Active input channels, active output channels, active groups.

    Raises:
        InputError: see :func:`elastic_conv2d`.
    """
    out_maximum, per_group = shape[:2]
    if groups < 1 or out_maximum % groups:
        raise InputError(f"groups={groups} does not divide the {out_maximum} output channels of weight; give a divisor")
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
    if not -x.dim() <= dim < x.dim():
        raise InputError(f"{where}: x has shape {tuple(x.shape)}, which has no dimension {dim} of channels; give one")
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
    padding: Padding,
    dilation: int | tuple[int, int],
    groups: int,
    kernel: Kernel = None,
) -> Tensor:
    """Convolves with channels that have been read already, by the kernel that :mod:`jdkd.ops.elastic_kernels` selects.

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
    name = "aten"
    if not elastic_kernels.only_aten(x.device):
        taps = kernel or weight.shape[2:]
        name = elastic_kernels.name_of(x, inputs, outputs, taps, stride, padding, dilation, groups)
    return convolve_by(name, x, weight, bias, inputs, outputs, stride, padding, dilation, groups, kernel)


def convolve_by(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Channels,
    outputs: Channels,
    stride: int | tuple[int, int],
    padding: Padding,
    dilation: int | tuple[int, int],
    groups: int,
    kernel: Kernel = None,
) -> Tensor:
    """Convolves by a kernel of :data:`jdkd.ops.elastic_kernels.TABLE` that takes the call; the rest as of
    :func:`convolve`."""
    if name == "implicit_gemm":
        pixels = 0 if isinstance(padding, str) else padding  # "valid", as the table has no such kernel for "same"
        return implicit_gemm(x, crop(weight, kernel), bias, inputs, outputs, pair(stride), pair(pixels), pair(dilation))
    bias = None if bias is None else active_part(bias, outputs)  # [Cout]
    if name == "pointwise":
        return elastic_pointwise_conv2d(
            x, crop(weight, kernel), out_channels=outputs.count, stride=pair(stride)[0], shift=bias
        )
    columns = inputs if groups == 1 else Channels(weight.shape[1])
    part = active_part(weight, outputs, columns, kernel)  # [Cout, Cin / groups, kh, kw]
    if name == "matmul":
        return F.linear(x.permute(0, 2, 3, 1), part.flatten(1), bias).permute(0, 3, 1, 2)
    return conv2d(x, part, bias, stride, padding, dilation, groups)
