"""The elastic convolution under ``torch.compile``: an operator whose graph stays valid for every subnet.

A compiler specialises on every Python number it sees. So the numbers of active channels reach the graph as the lengths
of two index tensors, dimensions that are marked as dynamic; leading channels have an index tensor too, though their
weights are still read in place. What no shape depends on goes in a small tensor in host memory,
:func:`runtime_args`, that the compiler does not look into: the active kernel size, and whether input and output
channels are listed. The output of a smaller kernel under its smaller padding is as large as that of the whole kernel
under the whole padding, so another kernel size does not change the graph either.

The operators run those of :mod:`jdkd.ops.elastic_conv`. They are marked as unsafe in CUDA graphs, whose replay would
not read them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from jdkd.errors import InputError
from jdkd.ops.active_channels import Channels, Kernel, crop
from jdkd.ops.elastic_kernels import dtype_of
from jdkd.ops.kernel_size import Padding, pair, transform_sizes, transformed

_Pair = Sequence[int]  # vertical, horizontal, in pixels


def runtime_args(inputs: Channels, outputs: Channels, kernel: Kernel, weight: Tensor) -> Tensor:
    """What the graph of a convolution is not to know.

    Args:
        inputs: active input channels.
        outputs: active output channels.
        kernel: active centre of the kernel; None: all of it.
        weight: shared weight, ``[Cout_max, Cin_max / groups, kh, kw]``.

    Returns:
        ``[4]`` int64 in host memory: the height and width of the active kernel, whether input and output channels are
        listed.
    """
    height, width = kernel or weight.shape[2:]
    return torch.tensor([height, width, inputs.index is not None, outputs.index is not None], device="cpu")


def convolve_traced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    out_index: Tensor,
    runtime_args: Tensor,
    stride: int | _Pair,
    padding: Padding,
    dilation: int | _Pair,
    groups: int,
) -> Tensor:
    """Convolves with the active channels, for a graph that stays when they change; differentiable once.

    Args:
        x: ``[N, Cin, H, W]`` or ``[Cin, H, W]``.
        weight: ``[Cout_max, Cin_max / groups, kh, kw]``.
        bias: ``[Cout_max]`` or None.
        in_index: ``[Cin]`` int64, active input channels, leading ones too.
        out_index: ``[Cout]`` int64, likewise.
        runtime_args: see :func:`runtime_args`.
        stride: in pixels.
        padding: of the whole kernel, in pixels, or ``"same"`` or ``"valid"``.
        dilation: in pixels.
        groups: of the whole convolution.

    Returns:
        ``[N, Cout, OH, OW]`` or ``[Cout, OH, OW]``.

    Raises:
        InputError: on a dtype of ``x`` that is not the weight's, once autocast has cast both.
    """
    if dtype_of(x) != dtype_of(weight):
        raise InputError(
            f"x is {x.dtype} and the weight is {weight.dtype}; give both one dtype, or use autocast, which casts all "
            "but float64"
        )
    x = x.to(dtype_of(x))
    window = pair(dilation)
    if padding == "same":
        spare = [d * (size - 1) for d, size in zip(window, weight.shape[2:], strict=True)]
        above, left = (pixels // 2 for pixels in spare)
        x, padding = F.pad(x, (left, spare[1] - left, above, spare[0] - above)), 0
    args = runtime_args, pair(stride), pair(0 if padding == "valid" else padding), window, groups
    if x.dim() == 3:
        return torch.ops.jdkd.elastic_conv_traced_fwd(x[None], weight, bias, in_index, out_index, *args)[0]
    return torch.ops.jdkd.elastic_conv_traced_fwd(x, weight, bias, in_index, out_index, *args)


def transformed_traced(weight: Tensor, step: Tensor, transforms: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Filters of every kernel size, and of these the ones of one size, for a graph that stays when it changes.

    Args:
        weight: ``[Cout_max, Cin_max / groups, k, k]``.
        step: ``[1]`` int64 beside the weight: how many steps smaller the active kernel is.
        transforms: see :func:`jdkd.ops.kernel_size.transformed`.

    Returns:
        ``[Cout_max, Cin_max / groups, k, k]``, zero around the active kernel.
    """
    filters = [weight]
    for _, smaller in transform_sizes(weight.shape[-1]):
        part = transformed(crop(filters[-1], (smaller + 2,) * 2), (smaller,) * 2, transforms)
        filters.append(F.pad(part, [(weight.shape[-1] - smaller) // 2] * 4))
    return torch.stack(filters).index_select(0, step)[0]


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe)
_library.define(
    "elastic_conv_traced_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor in_index, Tensor out_index, "
    "Tensor runtime_args, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "elastic_conv_traced_bwd(Tensor dout, Tensor x, Tensor weight, Tensor in_index, Tensor out_index, "
    "Tensor runtime_args, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *args) -> Tensor:
    x, centre, rest = _active(x, weight, *args)
    return torch.ops.jdkd.elastic_conv_fwd(x, centre, bias, *rest)  # [N, Cout, OH, OW]


def _backward(dout: Tensor, x: Tensor, weight: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    *args, wanted = args
    seen, centre, rest = _active(x, weight, *args)
    dx, dcentre, dbias = torch.ops.jdkd.elastic_conv_bwd(dout, seen, centre, *rest, wanted)
    if wanted[0] and seen.shape != x.shape:
        above, left = ((a - b) // 2 for a, b in zip(x.shape[2:], seen.shape[2:], strict=True))
        dx = F.pad(dx, (left, left, above, above))
    if not wanted[1] or centre.shape == weight.shape:
        return dx, dcentre, dbias
    dweight = torch.zeros_like(weight)
    crop(dweight, tuple(centre.shape[2:])).copy_(dcentre)
    return dx, dweight, dbias


def _active(
    x: Tensor, weight: Tensor, in_index: Tensor, out_index: Tensor, runtime_args: Tensor, stride: _Pair, padding: _Pair,
    dilation: _Pair, groups: int,
) -> tuple[Tensor, Tensor, tuple]:  # fmt: skip
    """The image, the centre of the kernel, and the other arguments of the operators of a fixed subnet."""
    height, width, ins_listed, outs_listed = runtime_args.tolist()
    spare = [d * (size - k) // 2 for d, size, k in zip(dilation, weight.shape[2:], (height, width), strict=True)]
    margin = [p - s for p, s in zip(padding, spare, strict=True)]
    if groups > 1:  # those of the inputs are those of the outputs
        groups, ins_listed = x.shape[1] // weight.shape[1], False
    index = in_index if ins_listed else None, out_index if outs_listed else None
    rest = *index, out_index.shape[0], stride, [max(0, pixels) for pixels in margin], dilation, groups
    return _inside(x, margin), crop(weight, (height, width)), rest


def _inside(x: Tensor, margin: _Pair) -> Tensor:
    """Cuts off the pixels of an image ``[N, C, H, W]`` where its margin is negative: it was padded before."""
    if min(margin) >= 0:
        return x
    for dim, pixels in zip((2, 3), margin, strict=True):
        x = x.narrow(dim, max(0, -pixels), x.shape[dim] + 2 * min(0, pixels))
    return x.clone()


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor, out_index: Tensor, runtime_args: Tensor, *window
) -> Tensor:
    return torch.ops.jdkd.elastic_conv_fwd(x, weight, bias, None, None, out_index.shape[0], *window)


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, in_index: Tensor, out_index: Tensor, runtime_args: Tensor, *window
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.jdkd.elastic_conv_bwd(dout, x, weight, None, None, out_index.shape[0], *window)


def _save(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, in_index, out_index, runtime_args, *ctx.window = inputs
    ctx.save_for_backward(x, weight, in_index, out_index, runtime_args)
    ctx.has_bias = bias is not None


def _gradients(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = torch.ops.jdkd.elastic_conv_traced_bwd(dout, *ctx.saved_tensors, *ctx.window, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 7


_library.impl("elastic_conv_traced_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("elastic_conv_traced_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::elastic_conv_traced_fwd", _forward_fake, lib=_library)
torch.library.register_fake("jdkd::elastic_conv_traced_bwd", _backward_fake, lib=_library)
torch.library.register_autograd("jdkd::elastic_conv_traced_fwd", _gradients, setup_context=_save, lib=_library)
