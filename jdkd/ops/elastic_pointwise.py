"""Elastic 1x1 convolution with what follows it in the same pass: two opaque operators and the autograd rule.

``jdkd::elastic_pointwise_fwd`` multiplies channels-last activations by the leading part of a shared weight, read in
place where the kernel can (:func:`jdkd.kernels.elastic_pointwise.readable_in_place`) and packed otherwise. Its epilogue
is a folded batch normalisation with activation and residual, or the statistics that a batch normalisation in training
needs. The gradient of the epilogue is plain torch around ``jdkd::elastic_pointwise_bwd``.

ATen on the slice is the default; :mod:`jdkd.ops.elastic_kernels` says when the kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.ops import elastic_check, elastic_kernels
from jdkd.ops.active_channels import Channels, active_channels, gather, scatter
from jdkd.ops.layout import channels_last, empty_channels_last, in_layout
from jdkd.ops.onednn_workaround import conv2d_gradients
from jdkd.ops.transforms import is_looked_into
from jdkd.reference import elastic_pointwise as reference

_OP = "elastic_pointwise"
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def elastic_pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    out_channels: int | None = None,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Convolves 1x1 with the leading channels of a shared weight: ``act(scale * conv + shift)``, plus a residual.

    A bottleneck of ResNet ends with ``residual=identity, activation="relu"``. Gradients reach whatever requires one;
    those of the weight are exactly zero outside its active part.

    Args:
        x: ``[N, Cin, H, W]``, the leading Cin channels; copied unless it is channels-last.
        weight: shared weight, ``[Cout_max, Cin_max]`` or ``[Cout_max, Cin_max, 1, 1]``. Read in place on sm_90 if it
            has the dtype of ``x`` and its rows are multiples of 16 bytes, else packed in the dtype of ``x``.
        out_channels: leading output channels that are active; None is all.
        stride: 1 or 2, in pixels, both ways.
        scale: ``[Cout]``, of a folded batch normalisation, with ``shift``; or None.
        shift: ``[Cout]``, or None; alone it is a bias.
        residual: ``[N, Cout, OH, OW]``, added; or None.
        activation: ``"none"``; ``"relu"``, after the residual; ``"relu_then_add"``, before it.

    Returns:
        ``[N, Cout, OH, OW]``, channels-last, of the dtype of ``x``.

    Raises:
        InputError: if shapes, channels or dtypes do not fit.

    Source:
        Leading channels of one shared weight: Cai et al., Once-for-All, ICLR 2020, section 3.2.
    """
    count = _checked(x, weight, out_channels, stride)
    _check_epilogue(x, count, stride, scale, shift, residual, activation)
    x = x.to(elastic_kernels.dtype_of(x))
    wide = reference.wide_dtype(x.dtype)
    scale, shift = (None if vector is None else vector.to(wide) for vector in (scale, shift))
    residual = None if residual is None else residual.to(x.dtype)
    run = _composed if is_looked_into() else _ElasticPointwise.apply
    return run(x, weight, scale, shift, residual, count, stride, activation, False)[0]


def elastic_pointwise_conv2d_stats(
    x: Tensor, weight: Tensor, *, out_channels: int | None = None, stride: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolves 1x1 and takes the statistics of the result that a batch normalisation in training needs.

    The kernel takes them of its fp32 sums, before these are rounded; the default route, of the rounded result. Both
    are differentiable.

    Args:
        x: as :func:`elastic_pointwise_conv2d`.
        weight: likewise.
        out_channels: likewise.
        stride: likewise.

    Returns:
        ``[N, Cout, OH, OW]``, channels-last; its mean and its biased variance over all positions, ``[Cout]``, fp32
        (fp64 of fp64).

    Raises:
        InputError: if shapes or channels do not fit.
    """
    count = _checked(x, weight, out_channels, stride)
    settings = (None, None, None, count, stride, "none", True)
    run = _composed if is_looked_into() else _ElasticPointwise.apply
    y, stats = run(x.to(elastic_kernels.dtype_of(x)), weight, *settings)
    return y, stats[0], stats[1]


def _checked(x: Tensor, weight: Tensor, out_channels: int | None, stride: int) -> int:
    """Active output channels; raises InputError on what no backend takes."""
    if x.dim() != 4 or not x.is_floating_point():
        raise InputError(f"x is a {x.dim()}-dimensional {x.dtype} tensor; give floating [N, Cin, H, W]")
    if weight.dim() not in (2, 4) or weight.shape[2:].numel() != 1:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}; give [Cout_max, Cin_max] or [Cout_max, Cin_max, 1, 1], "
            "and other kernels to elastic_conv2d"
        )
    if x.device != weight.device:
        raise InputError(f"x is on {x.device} and weight on {weight.device}; move one of them")
    if stride not in (1, 2):
        raise InputError(f"stride={stride!r}; give 1 or 2, and other windows to elastic_conv2d")
    active_channels(x.shape[1], weight.shape[1], "x")
    outputs = active_channels(out_channels, weight.shape[0], "out_channels")
    if outputs.index is not None:
        raise InputError(
            f"out_channels lists {outputs.count} channels; give the number of leading ones, or lists to elastic_conv2d"
        )
    return outputs.count


def _check_epilogue(
    x: Tensor, count: int, stride: int, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    activation: str,
) -> None:  # fmt: skip
    if activation not in reference.ACTIVATIONS:
        raise InputError(f"activation={activation!r}; choose one of {', '.join(reference.ACTIVATIONS)}")
    if scale is not None and shift is None:
        raise InputError("scale is given without shift; give both, or shift alone as a bias")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (vector.shape != (count,) or vector.device != x.device):
            raise InputError(
                f"{name} has shape {tuple(vector.shape)} on {vector.device}, but {count} output channels are active "
                f"on {x.device}; give [{count}] there"
            )
    if residual is None:
        return
    shape = (x.shape[0], count, *_out_size(x, stride))
    if residual.shape != shape or residual.device != x.device:
        raise InputError(
            f"residual has shape {tuple(residual.shape)} on {residual.device}, but the result {shape} on {x.device}; "
            "give it that shape there"
        )
    if elastic_kernels.dtype_of(residual) != elastic_kernels.dtype_of(x):
        raise InputError(f"residual is {residual.dtype} and x {x.dtype}; cast the residual to {x.dtype}")


def _composed(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    out_channels: int, stride: int, activation: str, stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ATen and its autograd, for a program that is exported."""
    total = F.conv2d(x, _part(weight, out_channels, x), stride=stride)
    y = total if stats else reference.epilogue(total, scale, shift, residual, activation)
    return in_layout(y, torch.channels_last), reference.moments(total) if stats else total


class _ElasticPointwise(torch.autograd.Function):
    """The autograd rule around the operators: returns y and its moments, ``[2, Cout]`` or empty."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None,
        residual: Tensor | None, out_channels: int, stride: int, activation: str, stats: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, moments = torch.ops.jdkd.elastic_pointwise_fwd(
            x, weight, scale, shift, residual, out_channels, stride, activation, stats
        )
        ctx.save_for_backward(
            x, weight, scale, y if activation == "relu" or stats else None, moments if stats else None,
            shift if activation == "relu_then_add" else None,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.window, ctx.activation = (out_channels, stride), activation
        if not stats:
            ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dmoments: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale, y, moments, shift = ctx.saved_tensors
        needs_x, needs_weight, needs_scale, needs_shift, needs_residual = ctx.needs_input_grad[:5]
        (out_channels, stride), run = ctx.window, torch.ops.jdkd.elastic_pointwise_bwd
        if moments is not None and dmoments is not None:  # a compiler gives zeros for None
            dout = _add_statistics(dout, y, moments, dmoments)
        if dout is None:
            return (None,) * 9
        dresidual = dout
        if ctx.activation == "relu_then_add":
            y = torch.ops.jdkd.elastic_pointwise_fwd(
                x, weight, scale, shift, None, out_channels, stride, "relu", False
            )[0]
        if ctx.activation != "none":
            dout = torch.where(y > 0, dout, 0)
            dresidual = dout if ctx.activation == "relu" else dresidual
        dscale = dshift = None
        if needs_shift:
            dshift = dout.sum((0, 2, 3), dtype=reference.wide_dtype(dout.dtype))
        if needs_scale:  # sum over positions of dout conv = sum over Cin of W (dout^T x)
            active = weight[:out_channels, : x.shape[1]].to(scale.dtype)
            _, unscaled = run(dout, x, active, stride, [False, True])
            dscale = (active * unscaled).flatten(1).sum(1)
        if scale is not None:
            dout = (dout * scale[:, None, None]).to(x.dtype)
        dx, dweight = run(dout, x, weight, stride, [needs_x, needs_weight])
        return (
            dx if needs_x else None, dweight if needs_weight else None, dscale, dshift,
            dresidual if needs_residual else None, None, None, None, None,
        )  # fmt: skip


def _add_statistics(dout: Tensor | None, y: Tensor, moments: Tensor, dmoments: Tensor) -> Tensor:
    """The gradient that reaches y through its mean and variance, added to what reaches it directly."""
    (dmean, dvariance), mean = (dmoments * (y.shape[1] / y.numel()))[..., None, None], moments[0][:, None, None]
    total = dmean + 2 * dvariance * (y - mean)  # [N, Cout, OH, OW]
    return (total if dout is None else dout + total).to(y.dtype)


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "elastic_pointwise_fwd(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
    "SymInt out_channels, SymInt stride, str activation, bool stats) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "elastic_pointwise_bwd(Tensor dout, Tensor x, Tensor weight, SymInt stride, bool[2] wanted) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _out_size(x: Tensor, stride: int) -> tuple[int, int]:
    return (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1


def _operand(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight as the kernels read it, ``[Cout_max, Cin_max]`` in place or a packed copy of its active part."""
    from jdkd.kernels.elastic_pointwise import readable_in_place

    weight = weight.flatten(1)
    if readable_in_place(weight, dtype):
        return weight
    vector = 16 // dtype.itemsize
    width = (columns + vector - 1) // vector * vector  # rows of whole 16 bytes
    packed = weight.new_empty((rows, width), dtype=dtype)[:, :columns]
    return packed.copy_(weight[:rows, :columns])


def _kernel_runs(x: Tensor, out_shape: Sequence[int], stride: int, form: str) -> bool:
    call = elastic_kernels.within(x, out_shape, (1, 1), (stride, stride), (0, 0), False, form)
    return elastic_kernels.kernel_runs("pointwise", call)


def _forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    out_channels: int, stride: int, activation: str, stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _kernel_runs(x, (x.shape[0], out_channels, *_out_size(x, stride)), stride, "forward"):
        given = (x, weight, scale, shift, residual, out_channels, stride, activation, stats)
        return _triton_fwd(*given, elastic_kernels.allow_tf32())
    part = _part(weight, out_channels, x)
    total = torch.ops.aten.convolution(x, part, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1)
    moments = reference.moments(total) if stats else x.new_empty(0, dtype=reference.wide_dtype(x.dtype))
    if shift is not None or residual is not None or activation != "none":
        total = reference.epilogue(total, scale, shift, residual, activation)
    return channels_last(total), moments


def _triton_fwd(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    out_channels: int, stride: int, activation: str, stats: bool, allow_tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from jdkd.kernels.elastic_pointwise import elastic_pointwise_fwd

    y = empty_channels_last(x, x.shape[0], out_channels, *_out_size(x, stride))
    if shift is not None and scale is None:
        scale = torch.ones_like(shift)
    moments = elastic_pointwise_fwd(
        channels_last(x), _operand(weight, out_channels, x.shape[1], x.dtype), y, stride=stride,
        scale=None if scale is None else scale.contiguous(), shift=None if shift is None else shift.contiguous(),
        residual=None if residual is None else channels_last(residual), activation=activation, stats=stats,
        whole=weight.shape[0], allow_tf32=allow_tf32,
    )  # fmt: skip
    return y, x.new_empty(0, dtype=torch.float32) if moments is None else moments


def _part(weight: Tensor, rows: int, x: Tensor) -> Tensor:
    """The active slice for ATen, ``[Cout, Cin, 1, 1]`` in the dtype of x."""
    return gather(weight, Channels(rows), Channels(x.shape[1])).to(x.dtype).flatten(1)[..., None, None]


def _forward_fake(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    out_channels: int, stride: int, activation: str, stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (2, out_channels) if stats else (0,)
    y = empty_channels_last(x, x.shape[0], out_channels, *_out_size(x, stride))
    return y, x.new_empty(shape, dtype=reference.wide_dtype(x.dtype))


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = dout.shape[1]
    if not _kernel_runs(x, dout.shape, stride, "gradient"):
        dx, dpart, _ = conv2d_gradients(dout, x, _part(weight, rows, x), stride, 0, 1, 1, [*wanted, False])
        dweight = weight.new_empty(0)
        if wanted[1] and dpart is not None:
            dpart = dpart.reshape(rows, x.shape[1], *weight.shape[2:])
            dweight = scatter(dpart, weight, Channels(rows), Channels(x.shape[1]))
        return x.new_empty(0) if dx is None or not wanted[0] else channels_last(dx), dweight
    return _triton_bwd(dout, x, weight, stride, wanted, elastic_kernels.allow_tf32())


def _triton_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool], allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    from jdkd.kernels import elastic_pointwise_grad as kernels

    rows, dout, x = dout.shape[1], channels_last(dout), channels_last(x)
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if wanted[0]:
        dx = empty_channels_last(x, *x.shape) if stride == 1 else torch.zeros_like(x, memory_format=torch.channels_last)
        operand = _operand(weight, rows, x.shape[1], x.dtype)
        kernels.elastic_pointwise_dx(dout, operand, dx, stride=stride, whole=weight.shape[1], allow_tf32=allow_tf32)
    if wanted[1]:
        dweight = torch.zeros_like(weight)
        kernels.elastic_pointwise_dw(dout, x, dweight.flatten(1), stride=stride, allow_tf32=allow_tf32)
    return dx, dweight


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = empty_channels_last(x, *x.shape) if wanted[0] else x.new_empty(0)
    return dx, torch.empty_like(weight) if wanted[1] else weight.new_empty(0)


_backend.register(_OP, "reference", why="ATen on the active part of the weight: cuDNN, oneDNN")
_backend.register(
    _OP, "triton", dtypes=_TRITON_DTYPES, why="on request, or where `jdkd tune` found it faster",
    checks={
        "forward": lambda _, *where: elastic_check.pointwise_forward(_triton_fwd, *where),
        "gradient": lambda _, *where: elastic_check.pointwise_gradient(_triton_bwd, *where),
    },
)  # fmt: skip
_library.impl("elastic_pointwise_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("elastic_pointwise_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::elastic_pointwise_fwd", _forward_fake, lib=_library)
torch.library.register_fake("jdkd::elastic_pointwise_bwd", _backward_fake, lib=_library)
