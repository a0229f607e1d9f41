"""What an elastic 1x1 convolution computes: the specification, in plain torch and in any precision."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu_then_add")


def elastic_pointwise(x: Tensor, weight: Tensor, *, out_channels: int, stride: int = 1) -> Tensor:
    """Multiplies every position by the leading rows and columns of a shared weight.

    Args:
        x: ``[N, Cin, H, W]``.
        weight: ``[Cout_max, Cin_max]``, perhaps with two trailing dimensions of one.
        out_channels: active output channels.
        stride: in pixels, both ways.

    Returns:
        ``[N, Cout, OH, OW]``.
    """
    active = weight.flatten(1)[:out_channels, : x.shape[1]]  # [Cout, Cin]
    return torch.einsum("nchw,oc->nohw", x[:, :, ::stride, ::stride], active)


def epilogue(
    total: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """Applies the folded batch normalisation, the activation and the residual, rounding once.

    Args:
        total: ``[N, C, H, W]``.
        scale: ``[C]``, or None.
        shift: ``[C]``, or None.
        residual: shape of ``total``, or None.
        activation: ``"none"``; ``"relu"``, last of all; ``"relu_then_add"``, before the residual.

    Returns:
        Shape and dtype of ``total``.
    """
    y = total.to(wide_dtype(total.dtype))
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    if activation == "relu_then_add":
        y = y.relu()
    if residual is not None:
        y = y + residual
    return (y.relu() if activation == "relu" else y).to(total.dtype)


def moments(total: Tensor) -> Tensor:
    """Mean and biased variance over all positions.

    Args:
        total: ``[N, C, H, W]``.

    Returns:
        ``[2, C]``, float32 at least.
    """
    variance, mean = torch.var_mean(total.to(wide_dtype(total.dtype)), dim=(0, 2, 3), correction=0)
    return torch.stack([mean, variance])


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns: the dtype that statistics and epilogues of activations of ``dtype`` are computed in."""
    return torch.promote_types(dtype, torch.float32)
