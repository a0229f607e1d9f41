"""See :func:`read_ahead`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from jdkd.errors import InputError

Items = list[tuple[torch.Tensor, dict[str, Any]]]

FILES_PER_WORKER = 12  # pipes and locks of a worker, and the batches of it that are under way, one file each
SPARE_FILES = 32  # for whatever else the process opens meanwhile


class Batches(Protocol):
    """Batches by number."""

    def __getitem__(self, number: int) -> Items: ...


def read_ahead(source: Batches, numbers: Sequence[int], workers: int, pin: bool = False) -> Iterator[Items]:
    """Yields numbered batches in order, read by worker processes.

    A batch comes from its worker as one block of shared memory, however many images and masks it has: torch holds an
    open file for every tensor that is under way.

    Args:
        source: gives a batch, images uint8 [3, H, W] with their targets, for its number.
        numbers: which batches.
        workers: processes that read ahead; 0 reads in this process.
        pin: put images into pinned memory.

    Raises:
        InputError: the process may not open as many files as the workers need; while iterating, a worker died, or
            whatever reading a batch raises.
    """
    if workers == 0 or not len(numbers):
        return (source[number] for number in numbers)
    workers = min(workers, len(numbers))
    _allow_open_files(workers)
    return _unpacked(source, numbers, workers, pin)


def _unpacked(source: Batches, numbers: Sequence[int], workers: int, pin: bool) -> Iterator[Items]:
    loader = DataLoader(
        _Packed(source),
        batch_size=None,  # an item is a whole batch already
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        generator=torch.Generator(),  # otherwise the loader draws its workers' seed from the global generator
    )
    batches = iter(loader)
    for _ in numbers:
        try:
            packed = next(batches)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"one of {workers} worker processes died ({reason}), which mostly means that memory or shared memory "
                "ran out; give fewer --workers, or 0"
            ) from error
        if isinstance(packed, InputError):
            raise packed
        yield _unpack(*packed)


class _Packed(Dataset):
    """Batches in few pieces. A read error is an item too, so that a worker can hand it over as it is."""

    def __init__(self, source: Batches) -> None:
        self.source = source

    def __getitem__(self, number: int) -> tuple[torch.Tensor, list[Any], list[Any]] | InputError:
        try:
            items = self.source[number]
        except InputError as error:
            return InputError(str(error))
        pieces = [image for image, _ in items]  # [3, H, W] each
        pieces += [target["masks"] for _, target in items if "masks" in target]  # [M, H, W] each
        flat = torch.cat([piece.reshape(-1) for piece in pieces])  # [bytes of all images and masks]
        return flat, [tuple(piece.shape) for piece in pieces], [_as_arrays(target) for _, target in items]


def _unpack(flat: torch.Tensor, shapes: list[Any], targets: list[Any]) -> Items:
    pieces = flat.split([channels * height * width for channels, height, width in shapes])
    views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    images, masks = views[: len(targets)], iter(views[len(targets) :])
    return [(image, _as_tensors(target, masks)) for image, target in zip(images, targets, strict=True)]


def _as_arrays(target: dict[str, Any]) -> dict[str, Any]:
    """A target with its tensors as arrays, which travel without a file of their own, and no masks."""
    held = {key: None if key == "masks" else value for key, value in target.items()}
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in held.items()}


def _as_tensors(target: dict[str, Any], masks: Iterator[torch.Tensor]) -> dict[str, Any]:
    held = {key: next(masks) if key == "masks" else value for key, value in target.items()}
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in held.items()}


def _as_is(batch: Any) -> Any:
    return batch


def _allow_open_files(workers: int) -> None:
    """Raises the soft limit of open files where workers need it.

    Raises:
        InputError: the hard limit is too low. Without this, workers end in an EOFError, or wait for ever.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        in_use = len(os.listdir("/dev/fd"))
    except OSError:  # there is no such folder, or listing it is one open file too many
        in_use = 0
    needed = in_use + SPARE_FILES + FILES_PER_WORKER * workers
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        fitting = max(0, (hard - in_use - SPARE_FILES) // FILES_PER_WORKER)
        raise InputError(
            f"{workers} worker processes need about {needed} open files and this process may open {hard} "
            f"(ulimit -Hn), {in_use} of which are in use; give --workers {fitting}, or raise the limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
