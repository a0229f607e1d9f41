"""Flat buffers for packed weights and dense gradients; on a CPU with an eye to what fresh memory costs.

A page that is written for the first time is cleared by the operating system, which takes about as long as filling it,
and with pages of 4 KB ten times as long. Large buffers are therefore mapped here, in pages of 2 MB.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes

_kept_pages: list[mmap.mmap] = []
_lock = threading.Lock()


def zeros(numel: int, like: Tensor) -> Tensor:
    """A buffer of zeros; a large one on Linux is cleared by the operating system, and only where it is written.

    Untouched pages are read from one page of zeros. Clearing the dense gradients of ResNet-50 takes longer than
    filling in those of a subnet of half its width.

    Args:
        numel: elements.
        like: for the dtype and the device.

    Returns:
        ``[numel]``.
    """
    if not _is_mapped(numel, like.dtype, like.device):
        return torch.zeros(numel, dtype=like.dtype, device=like.device)
    return _on_pages(_pages(numel * like.element_size()), numel, like.dtype)


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
    size = numel * dtype.itemsize
    with _lock:
        for place in range(len(_kept_pages)):
            memory = _kept_pages[place]
            is_free = sys.getrefcount(memory) == 3  # the list, this name and the call: no tensor
            if is_free and size + 2 * HUGE_PAGE <= len(memory) <= 2 * size + 2 * HUGE_PAGE:
                _kept_pages.append(_kept_pages.pop(place))
                return _on_pages(memory, numel, dtype)
        _kept_pages.append(_pages(size))
        del _kept_pages[:-2]
        return _on_pages(_kept_pages[-1], numel, dtype)


def _is_mapped(numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and numel * dtype.itemsize >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")


def _pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _on_pages(memory: mmap.mmap, numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor that begins with a whole huge page; it holds on to the memory."""
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=first)
