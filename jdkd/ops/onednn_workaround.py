"""ATen's convolution, past a fault of oneDNN.

The gradient of a strided 1x1 filter is wrong on a CPU, up to PyTorch 2.11 at least, if a channels-last image has fewer
channels than a vector has lanes (2 to 7 with AVX2, to 15 with AVX-512): oneDNN writes past its workspace (its issue
6035), which damages the heap, often without a wrong value to see. Slim subnets get there. Such a convolution takes the
positions that it reads out of the image first, and is no longer strided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.ops.kernel_size import Padding, pair

_LANES = 16  # the widest vector's
_Pair = int | Sequence[int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: Padding = 0,
    dilation: _Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d``.

    Args:
        x: ``[N, Cin, H, W]`` or ``[Cin, H, W]``.
        weight: ``[Cout, Cin / groups, kh, kw]``.
        bias: ``[Cout]`` or None.
        stride, padding, dilation: in pixels.
        groups: of the channels.

    Returns:
        ``[N, Cout, OH, OW]`` or ``[Cout, OH, OW]``.
    """
    if _is_at_fault(x, weight, stride, padding):
        x, stride = _read(x, stride), 1
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv2d_gradients(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d`, outside of autograd.

    Args:
        dout: ``[N, Cout, OH, OW]``.
        x, weight, stride, padding, dilation, groups: as there, of a batch.
        wanted: whether to compute the gradients of x, weight and bias.

    Returns:
        These; those that are not wanted may be None.
    """
    seen, step = (_read(x, stride), 1) if _is_at_fault(x, weight, stride, padding) else (x, stride)
    window = pair(step), pair(padding), pair(dilation), False, [0, 0], groups
    dseen, *others = torch.ops.aten.convolution_backward(dout, seen, weight, [weight.shape[0]], *window, wanted)
    if seen is x or not wanted[0]:
        return dseen, *others
    dx = torch.zeros_like(x)
    _read(dx, stride).copy_(dseen)
    return dx, *others


def _is_at_fault(x: Tensor, weight: Tensor, stride: _Pair, padding: Padding) -> bool:
    return (
        x.device.type == "cpu"
        and weight.shape[1] < _LANES
        and weight.shape[2:] == (1, 1)
        and pair(stride) != (1, 1)
        and (padding == "valid" or pair(padding) == (0, 0))
    )


def _read(x: Tensor, stride: _Pair) -> Tensor:
    """The positions of an image that a 1x1 filter reads."""
    rows, columns = pair(stride)
    return x[..., ::rows, ::columns]
