"""See :func:`batches` and :func:`in_order`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from jdkd.data.coco import CocoDetectionDataset
from jdkd.data.order import Order
from jdkd.data.reading_ahead import Items, read_ahead
from jdkd.errors import InputError

Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]

_FLIP = 1  # the random stream of a seed that decides flips; another orders images


def batches(
    dataset: CocoDetectionDataset,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    start: int = 0,
    every: int = 1,
    joined: int = 1,
    by_aspect: bool = False,
    flip: float = 0.0,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield the training batches ``start .. steps - 1``.

    Batch k is a pure function of (seed, k): epochs are shuffled permutations without replacement, laid end to
    end and cut into batches (a batch may span two or, for a tiny data set, many epochs), and flips are drawn
    anew per batch. A run resumed at ``start=k`` therefore sees what the uninterrupted one would have seen, with
    any number of workers; and ``joined=n`` batches of B images are together what one batch of n * B is. The global
    random state is neither read nor advanced.

    Args:
        dataset: what to draw from.
        batch_size: images per batch.
        steps: number of the batch to stop before; ``steps - start`` batches are yielded, or each ``every``-th of them.
        seed: of order and flips.
        start: number of the first batch.
        every: yield each ``every``-th batch only, as one of so many processes does that share them.
        joined: batches of one optimizer step: so many in a row are one batch of so many times the size, cut into parts.
        by_aspect: let the images of a step all be landscape or all portrait, so that little of a batch is padding;
            where there are enough of both, see :class:`jdkd.data.order.Order`.
        flip: probability of mirroring an image left to right; leave it 0 where ``dataset.mirror_symmetric`` is
            False.
        workers: processes that read ahead; 0 reads in this process.
        device: where images and what of targets is a tensor are put.

    Yields:
        images: ``batch_size`` tensors [3, H, W] float32 in 0..1, of any sizes.
        targets: as of :class:`~jdkd.data.coco.CocoDetectionDataset`, one per image.

    Raises:
        InputError: an argument is out of range; while iterating, an image cannot be read.
    """
    _require_least(
        ("batch_size", batch_size, 1),
        ("steps", steps, 0),
        ("start", start, 0),
        ("every", every, 1),
        ("joined", joined, 1),
        ("seed", seed, 0),
        ("workers", workers, 0),
    )
    if not 0 <= flip <= 1:
        raise InputError(f"flip is {flip} but is a probability; give a value from 0 to 1")
    device = torch.device(device)
    groups = getattr(dataset, "landscape", None) if by_aspect else None
    order = Order(len(dataset), joined * batch_size, seed, groups)
    source, numbers = _Batches(dataset, order, joined, flip), range(start, steps, every)
    return _on_device(read_ahead(source, numbers, workers, pin=device.type == "cuda"), device)


def in_order(
    dataset: CocoDetectionDataset,
    *,
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    every: int = 1,
    pin: bool = False,
) -> Iterator[Items]:
    """Yield all images of a data set with their targets, in order, in lists of at most ``batch_size``.

    Args:
        dataset: what to read.
        batch_size: images per list.
        workers: processes that read ahead; 0 reads in this process.
        start, every: yield the lists ``start``, ``start + every`` and so on only, as one of several processes does.
        pin: let workers' images come in pinned memory, from which a GPU copies them while it works.

    Raises:
        InputError: an argument is out of range; while iterating, an image cannot be read.
    """
    _require_least(("batch_size", batch_size, 1), ("workers", workers, 0), ("start", start, 0), ("every", every, 1))
    slices = _Slices(dataset, batch_size)
    return read_ahead(slices, range(start, -(-len(dataset) // batch_size), every), workers, pin)


def _require_least(*settings: tuple[str, int, int]) -> None:
    """Refuses a setting below the least that it may be: name, value, least."""
    for name, value, least in settings:
        if value < least:
            raise InputError(f"{name} is {value} but must be at least {least}; give a larger one")


def _on_device(batches: Iterator[Items], device: torch.device) -> Iterator[Batch]:
    for items in batches:
        yield (
            [F.to_dtype(image.to(device, non_blocking=True), torch.float32, scale=True) for image, _ in items],
            [
                {
                    key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for key, value in target.items()
                }
                for _, target in items
            ],
        )


class _Slices:
    """Batches by number, in order."""

    def __init__(self, dataset: CocoDetectionDataset, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __getitem__(self, number: int) -> Items:
        first = number * self.batch_size
        return [self.dataset[index] for index in range(first, min(first + self.batch_size, len(self.dataset)))]


class _Batches:
    """Shuffled and mirrored batches by number, so many in a row being parts of one of the order; images still uint8."""

    def __init__(self, dataset: CocoDetectionDataset, order: Order, joined: int, flip: float) -> None:
        self.dataset, self.order, self.joined, self.flip = dataset, order, joined, flip

    def __getitem__(self, number: int) -> Items:
        whole, part = divmod(number, self.joined)
        size = self.order.batch // self.joined
        mine = slice(part * size, (part + 1) * size)
        flips = np.random.default_rng((self.order.seed, _FLIP, whole)).random(self.order.batch) < self.flip
        items = []
        for index, mirrored in zip(self.order[whole][mine], flips[mine], strict=True):
            item = self.dataset[index]
            items.append(_mirror(*item) if mirrored else item)
        return items


def _mirror(image: torch.Tensor, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    height, width = image.shape[-2:]
    boxes = BoundingBoxes(target["boxes"], format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
    mirrored = F.horizontal_flip(boxes).as_subclass(torch.Tensor)  # [M, 4]
    masks = {"masks": F.horizontal_flip(target["masks"])} if "masks" in target else {}  # [M, H, W]
    return F.horizontal_flip(image), {**target, "boxes": mirrored, **masks}
