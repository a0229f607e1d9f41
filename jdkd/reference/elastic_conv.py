"""What an elastic convolution computes: the specification, in plain torch and in any precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def elastic_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    in_channels: Sequence[int],
    out_channels: Sequence[int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolves as the supernet's whole convolution does when everything inactive is zero.

    The slim input is scattered into the supernet's width, the full convolution runs, and the active outputs
    are picked. An inactive weight meets only zeros on its way in or is dropped on its way out, so this is the
    masked network that every faster form must equal, gradients included.

    Args:
        x: activations of the active input channels, ``[N, len(in_channels), H, W]``.
        weight: the supernet's weight, ``[Cout_max, Cin_max, kh, kw]``.
        bias: the supernet's bias, ``[Cout_max]``, or None.
        in_channels: active input channels in the order in which ``x`` holds them.
        out_channels: active output channels in the order in which the result holds them.
        stride: step of the window, in pixels.
        padding: zeros on each side, in pixels.
        dilation: distance between taps, in pixels.

    Returns:
        ``[N, len(out_channels), OH, OW]``.
    """
    n, _, height, width = x.shape
    wide = x.new_zeros(n, weight.shape[1], height, width)  # [N, Cin_max, H, W]
    wide = wide.index_copy(1, torch.tensor(in_channels, device=x.device), x)
    full = F.conv2d(wide, weight, bias, stride, padding, dilation)  # [N, Cout_max, OH, OW]
    return full.index_select(1, torch.tensor(out_channels, device=x.device))


def elastic_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    channels: Sequence[int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """The depthwise form of :func:`elastic_conv2d`: each active channel is filtered alone.

    Args:
        x: activations of the active channels, ``[N, len(channels), H, W]``.
        weight: the supernet's filters, ``[C_max, 1, kh, kw]``.
        bias: the supernet's bias, ``[C_max]``, or None.
        channels: active channels in the order in which ``x`` holds them.
        stride, padding, dilation: as of :func:`elastic_conv2d`.

    Returns:
        ``[N, len(channels), OH, OW]``.
    """
    filtered = [
        F.conv2d(
            x[:, k : k + 1],
            weight[c : c + 1],
            None if bias is None else bias[c : c + 1],
            stride,
            padding,
            dilation,
        )
        for k, c in enumerate(channels)
    ]
    return torch.cat(filtered, dim=1)
