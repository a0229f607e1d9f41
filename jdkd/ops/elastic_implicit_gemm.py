"""The implicit GEMM of an elastic convolution: two opaque operators and the autograd rule around them.

``jdkd::elastic_conv_fwd`` runs a Triton kernel that reads the active filters where they lie in the shared weight,
through lists too, where :mod:`jdkd.ops.elastic_kernels` lets it, and ATen on a copy of them elsewhere;
``jdkd::elastic_conv_bwd`` is ATen's. They take the active parts of one group; ATen takes grouped ones as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from jdkd import _backend
from jdkd.ops import elastic_check, elastic_kernels
from jdkd.ops.active_channels import Channels, gather, on_device, scatter
from jdkd.ops.layout import layout_of
from jdkd.ops.onednn_workaround import conv2d_gradients

_OP = "elastic_conv"
_Pair = Sequence[int]  # vertical, horizontal, in pixels
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implicit_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Channels, outputs: Channels, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Convolves one group by the operators.

    Args:
        x, bias, inputs, outputs: as of :func:`jdkd.ops.elastic_conv.convolve`.
        weight: ``[Cout_max, Cin_max, kh, kw]``, any strides; cast where it is read.
        stride, padding, dilation: in pixels, vertical and horizontal.

    Returns:
        ``[N, Cout, OH, OW]``, in the layout of ``x`` and the dtype that a convolution of it is computed in.
    """
    x = x.to(elastic_kernels.dtype_of(x))
    lists = on_device(inputs.index, weight.device), on_device(outputs.index, weight.device)
    return _ElasticConv.apply(x, weight, bias, *lists, outputs.count, stride, padding, dilation, 1)


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


def _out_shape(
    x: Tensor, weight: Tensor, out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair
) -> tuple[int, ...]:
    """``[N, Cout, OH, OW]``."""
    size = elastic_kernels.out_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return (x.shape[0], out_channels, *size)


def _empty_output(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int,
) -> Tensor:  # fmt: skip
    shape = _out_shape(x, weight, out_channels, stride, padding, dilation)
    is_listed = in_index is not None or out_index is not None
    call = elastic_kernels.within(x, shape, weight.shape[2:], stride, padding, is_listed, "forward")
    if groups == 1 and elastic_kernels.kernel_runs("implicit_gemm", call):
        window = stride, padding, dilation, elastic_kernels.allow_tf32()
        return _forward_triton(x, weight, bias, shape, in_index, out_index, *window)
    rows, columns = _rows_columns(x, weight, in_index, out_index, out_channels, groups)
    part = gather(weight, rows, columns).to(x.dtype)  # [Cout, Cin / groups, kh, kw]
    bias = None if bias is None else gather(bias, rows, Channels(1)).to(x.dtype)  # [Cout]
    y = torch.ops.aten.convolution(x, part, bias, stride, padding, dilation, False, [0, 0], groups)
    return y.contiguous(memory_format=layout_of(x))


def _forward_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int], in_index: Tensor | None,
    out_index: Tensor | None, stride: _Pair, padding: _Pair, dilation: _Pair, allow_tf32: bool,
) -> Tensor:  # fmt: skip
    from jdkd.kernels.elastic_conv import elastic_conv_fwd

    y = _empty_output(x, shape)
    bias = None if bias is None else bias.contiguous()
    elastic_conv_fwd(x, weight, bias, y, in_index, out_index, stride, padding, dilation, allow_tf32)
    return y


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int,
) -> Tensor:  # fmt: skip
    return _empty_output(x, _out_shape(x, weight, out_channels, stride, padding, dilation))


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = _rows_columns(x, weight, in_index, out_index, out_channels, groups)
    part = gather(weight, rows, columns).to(x.dtype)  # [Cout, Cin / groups, kh, kw]
    dx, dpart, dbias = conv2d_gradients(dout, x, part, stride, padding, dilation, groups, wanted)
    empty = weight.new_empty
    return (
        dx.contiguous(memory_format=layout_of(x)) if wanted[0] else x.new_empty(0),
        scatter(dpart, weight, rows, columns) if wanted[1] else empty(0),
        scatter(dbias, empty(weight.shape[0]), rows, Channels(1)) if wanted[2] else empty(0),
    )


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    out_channels: int, stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    return (
        dx if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


_backend.register(_OP, "reference", why="ATen on the active part of the weight: cuDNN, oneDNN")
_backend.register(
    _OP, "triton", dtypes=_TRITON_DTYPES, why="on request, or where `jdkd tune` found it faster",
    checks={"forward": lambda _, *where: elastic_check.convolution(_forward_triton, *where)},
)  # fmt: skip
_library.impl("elastic_conv_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("elastic_conv_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::elastic_conv_fwd", _forward_fake, lib=_library)
torch.library.register_fake("jdkd::elastic_conv_bwd", _backward_fake, lib=_library)
