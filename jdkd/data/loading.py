"""See :func:`batches`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from jdkd.data.coco import CocoDetectionDataset
from jdkd.errors import InputError

Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]

_ORDER, _FLIP = 0, 1  # which random stream of a seed


def batches(
    dataset: CocoDetectionDataset,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    start: int = 0,
    flip: float = 0.0,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield the training batches ``start .. steps - 1``.

    Batch k is a pure function of (seed, k): epochs are shuffled permutations without replacement, laid end to
    end and cut into batches (a batch may span two or, for a tiny data set, many epochs), and flips are drawn
    anew per batch. A run resumed at ``start=k`` therefore sees what the uninterrupted one would have seen, with
    any number of workers. The global random state is neither read nor advanced.

    Args:
        dataset: what to draw from.
        batch_size: images per batch.
        steps: number of the batch to stop before; ``steps - start`` batches are yielded.
        seed: of order and flips.
        start: number of the first batch.
        flip: probability of mirroring an image left to right; leave it 0 where ``dataset.mirror_symmetric`` is
            False.
        workers: processes that read ahead; 0 reads in this process.
        device: where images, boxes and labels are put.

    Yields:
        images: ``batch_size`` tensors [3, H, W] float32 in 0..1, of any sizes.
        targets: as of :class:`~jdkd.data.coco.CocoDetectionDataset`, one per image.

    Raises:
        InputError: an argument is out of range; while iterating, an image cannot be read.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("steps", steps, 0),
        ("start", start, 0),
        ("seed", seed, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise InputError(f"{name} is {value} but must be at least {least}; give a larger one")
    if not 0 <= flip <= 1:
        raise InputError(f"flip is {flip} but is a probability; give a value from 0 to 1")
    return _stream(_Batches(dataset, batch_size, seed, flip), range(start, steps), workers, torch.device(device))


def _stream(source: _Batches, numbers: range, workers: int, device: torch.device) -> Iterator[Batch]:
    for read in _read(source, numbers, workers, pin=device.type == "cuda"):
        if isinstance(read, InputError):
            raise read
        images, targets = read
        yield (
            [F.to_dtype(image.to(device, non_blocking=True), torch.float32, scale=True) for image in images],
            [
                {
                    key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for key, value in target.items()
                }
                for target in targets
            ],
        )


def _read(source: _Batches, numbers: range, workers: int, pin: bool) -> Iterator[Batch | InputError]:
    if workers == 0:
        return (source[number] for number in numbers)
    loader = DataLoader(
        source,
        batch_size=None,  # an item is a whole batch already
        sampler=numbers,
        num_workers=min(workers, len(numbers)),
        collate_fn=_as_is,
        pin_memory=pin,
        generator=torch.Generator(),  # otherwise the loader draws its workers' seed from the global generator
    )
    return iter(loader)


def _as_is(batch: Batch | InputError) -> Batch | InputError:
    return batch


class _Batches(Dataset):
    """Batches by number; images still uint8. A read error is an item too, so that a worker can hand it over."""

    def __init__(self, dataset: CocoDetectionDataset, batch_size: int, seed: int, flip: float) -> None:
        self.dataset, self.batch_size, self.seed, self.flip = dataset, batch_size, seed, flip

    def __getitem__(self, number: int) -> Batch | InputError:
        size = len(self.dataset)
        first = number * self.batch_size
        flips = np.random.default_rng((self.seed, _FLIP, number)).random(self.batch_size) < self.flip
        images, targets = [], []
        try:
            for place, mirrored in zip(range(first, first + self.batch_size), flips, strict=True):
                epoch, rank = divmod(place, size)
                image, target = self.dataset[_permutation(self.seed, epoch, size)[rank]]
                image, target = _mirror(image, target) if mirrored else (image, target)
                images.append(image)
                targets.append(target)
        except InputError as error:
            return error
        return images, targets


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(size)  # [size]


def _mirror(image: torch.Tensor, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    height, width = image.shape[-2:]
    boxes = BoundingBoxes(target["boxes"], format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
    mirrored = F.horizontal_flip(boxes).as_subclass(torch.Tensor)  # [M, 4]
    return F.horizontal_flip(image), {**target, "boxes": mirrored}
