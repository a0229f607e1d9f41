"""Buffers for packed weights and gradients; on a CPU with an eye to what fresh memory costs.

A page that is written for the first time is cleared by the operating system, which takes about as long as filling it,
and with pages of 4 KB ten times as long. Large buffers are therefore mapped here, in pages of 2 MB.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
MAPPED_FROM = HUGE_PAGE  # bytes of a buffer that is mapped here

_packed_pages: list[mmap.mmap] = []  # the last ones, packed weights live on them
_gradient_pages: list[mmap.mmap] = []
_KEPT = 2  # buffers of each of these kinds
_level_pages: list[mmap.mmap] = []  # gradients of features
_LEVELS_KEPT = 6
_lock = threading.Lock()


def zeros(numel: int, like: Tensor) -> Tensor:
    """A buffer of zeros; a large one on Linux takes the pages of one that is gone, which are still in a cache.

    Fresh pages are cleared by the operating system, and only where they are written; untouched ones are read from one
    page of zeros.

    Args:
        numel: elements.
        like: for the dtype and the device.

    Returns:
        ``[numel]``.
    """
    if not _is_mapped(numel, like.dtype, like.device):
        return torch.zeros(numel, dtype=like.dtype, device=like.device)
    memory, is_fresh = _taken(_gradient_pages, numel * like.element_size())
    buffer = _on_pages(memory, numel, like.dtype)
    return buffer if is_fresh else buffer.zero_()


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer whose contents are undefined; a large one on Linux takes the pages of one that is gone.

    Fresh pages cost about as much as packing into them; two buffers are kept, as a step that packs anew while the
    last graph is still alive needs.

    Args:
        numel: elements.
        dtype: of the buffer.
        device: of the buffer.

    Returns:
        ``[numel]``.
    """
    if not _is_mapped(numel, dtype, device):
        return torch.empty(numel, dtype=dtype, device=device)
    return _on_pages(_taken(_packed_pages, numel * dtype.itemsize)[0], numel, dtype)


def empty_like(level: Tensor) -> Tensor:
    """A gradient of features whose contents are undefined; a large one on Linux takes the pages of one that is gone.

    Clearing fresh pages costs more than computing the gradient; those of the last six large levels are kept.

    Args:
        level: ``[N, C, H, W]``, dense, for the shape, the strides, the dtype and the device.

    Returns:
        ``[N, C, H, W]``.
    """
    if not _is_mapped(level.numel(), level.dtype, level.device):
        return torch.empty_like(level)
    memory, _ = _taken(_level_pages, level.numel() * level.element_size(), _LEVELS_KEPT)
    return _on_pages(memory, level.numel(), level.dtype).as_strided(level.shape, level.stride())


def _is_mapped(numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and numel * dtype.itemsize >= MAPPED_FROM and hasattr(mmap, "MADV_HUGEPAGE")


def _taken(kept: list[mmap.mmap], size: int, most: int = _KEPT) -> tuple[mmap.mmap, bool]:
    """Pages that nobody uses, or else fresh ones, and whether they are fresh; the last ``most`` ones are kept."""
    with _lock:
        for place in range(len(kept)):
            if _references(kept, place) > _UNUSED:
                continue  # a tensor lives there
            if size + 2 * HUGE_PAGE <= len(kept[place]) <= 2 * size + 2 * HUGE_PAGE:
                kept.append(kept.pop(place))
                return kept[-1], False
        kept.append(_pages(size))
        del kept[:-most]
        return kept[-1], True


def _references(kept: Sequence[object], place: int) -> int:
    return sys.getrefcount(kept[place])


_UNUSED = _references([object()], 0)  # the list's and the call's own, which Python's versions count differently


def _pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _on_pages(memory: mmap.mmap, numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor that begins with a whole huge page; it holds on to the memory."""
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=first)
