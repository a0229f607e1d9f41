"""How the elements of an image lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from jdkd.ops.transforms import is_transformed


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` ``[N, C, H, W]`` is dense channels-last and nothing else."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout_name(x: Tensor) -> str:
    """The layout of ``x`` ``[N, C, H, W]`` in words: ``"channels-last"`` where it is nothing else."""
    return "channels-last" if is_channels_last(x) else "contiguous"


def layout_of(x: Tensor) -> torch.memory_format:
    """The dense layout of what is made of ``x`` ``[N, C, H, W]``: channels-last where ``x`` is nothing else."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_layout(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A tensor made dense in a layout, in which vmap has no tensors."""
    return tensor if is_transformed() else tensor.contiguous(memory_format=layout)


def channels_last(tensor: Tensor) -> Tensor:
    """A tensor ``[N, C, H, W]`` made dense channels-last, inside of an operator."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    """New memory of a dtype and device, ``[N, C, H, W]``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def size_class(size: int) -> str:
    """The class of a size in bytes by which `jdkd tune` chooses: below 1 MiB, 16 MiB, or more; caches end there."""
    return "<1 MiB" if size < 1 << 20 else "<16 MiB" if size < 1 << 24 else ">=16 MiB"
