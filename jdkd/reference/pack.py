"""What packing the active weights of a subnet computes, and its transpose: the specification, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdkd.errors import InputError

Active = int | Tensor  # the number of leading channels, or [count] int64


def crop_origin(whole: Sequence[int], kept: Sequence[int]) -> tuple[int, int]:
    """Where the centre crop of a kernel begins.

    Args:
        whole: ``(kh, kw)`` of the shared weight, in taps.
        kept: ``(kh', kw')``, in taps.

    Returns:
        First row and first column, in taps.

    Raises:
        InputError: if the crop is larger than the kernel, or its centre is not the kernel's.
    """
    if any(not 1 <= k <= w or (w - k) % 2 for w, k in zip(whole, kept, strict=True)):
        raise InputError(
            f"a kernel of {tuple(kept)} taps is no centre crop of {tuple(whole)}; take as many taps off both ends"
        )
    return (whole[0] - kept[0]) // 2, (whole[1] - kept[1]) // 2


def pack(
    weights: Sequence[Tensor],
    rows: Sequence[Active],
    columns: Sequence[Active],
    kernels: Sequence[tuple[int, int] | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Copies the active part of every weight.

    Args:
        weights: ``[Cout_max, Cin_max / groups, kh, kw]``, ``[Cout_max, Cin_max]`` or ``[C_max]``, any strides.
        rows: active channels of dimension 0, of each.
        columns: active channels of dimension 1, of each; ignored where there is no such dimension.
        kernels: ``(kh', kw')``, the centre crop, of each; None: the whole kernel.
        dtype: of the copies, rounded once to nearest.

    Returns:
        ``[Cout, Cin / groups, kh', kw']`` in channels-last memory, ``[Cout, Cin]`` or ``[C]``.
    """
    packed = []
    for weight, row, column, kernel in zip(weights, rows, columns, kernels, strict=True):
        part = _picked(_cropped(weight, kernel), 0, row)
        part = (part if weight.dim() == 1 else _picked(part, 1, column)).to(dtype)
        packed.append(part.clone(memory_format=torch.channels_last if part.dim() == 4 else torch.contiguous_format))
    return packed


def unpack_add_(
    gradients: Sequence[Tensor],
    rows: Sequence[Active],
    columns: Sequence[Active],
    kernels: Sequence[tuple[int, int] | None],
    packed: Sequence[Tensor],
) -> None:
    """Adds what belongs to the active parts, the transpose of :func:`pack`; nothing else is touched.

    Sums are formed in float32, or in float64 where a side has it, and rounded once.

    Args:
        gradients: shaped as the weights, any strides; changed in place.
        rows: as :func:`pack`.
        columns: as :func:`pack`.
        kernels: as :func:`pack`.
        packed: shaped as :func:`pack` returns them, any strides and dtype.
    """
    for whole, row, column, kernel, part in zip(gradients, rows, columns, kernels, packed, strict=True):
        active = _cropped(whole, kernel)
        at = [_indices(row, whole.device)]
        if whole.dim() > 1:
            at = [at[0][:, None], _indices(column, whole.device)[None, :]]
        wide = torch.promote_types(torch.promote_types(whole.dtype, part.dtype), torch.float32)
        active.index_put_(tuple(at), (active[tuple(at)].to(wide) + part.to(wide)).to(whole.dtype))


def _cropped(weight: Tensor, kernel: tuple[int, int] | None) -> Tensor:
    if weight.dim() != 4 or kernel is None:
        return weight
    top, left = crop_origin(weight.shape[2:], kernel)
    return weight[:, :, top : top + kernel[0], left : left + kernel[1]]


def _picked(tensor: Tensor, dim: int, active: Active) -> Tensor:
    return tensor.narrow(dim, 0, active) if isinstance(active, int) else tensor.index_select(dim, active)


def _indices(active: Active, device: torch.device) -> Tensor:
    return torch.arange(active, device=device) if isinstance(active, int) else active
