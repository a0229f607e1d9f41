"""What stands before and behind an exported detector, in numpy: resizing, padding, the last suppression, masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdkd.errors import InputError

Found = dict[str, np.ndarray]
"""Of one image: ``boxes`` [M, 4] xyxy in pixels, ``labels`` [M], ``scores`` [M], and ``masks`` [M, H, W] in 0..1."""


def batch_of(images: Sequence[np.ndarray], resize: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images as an exported detector takes them.

    Args:
        images: ``[H, W, 3]`` uint8, of any sizes.
        resize: ``min_size``, ``max_size`` and ``multiple``: the short side becomes the first, unless the long one would
            exceed the second, bilinearly and without antialiasing; then rows and columns are added at the bottom and
            the right, up to a multiple of the third. Or ``fixed``, height and width to which all are resized.

    Returns:
        ``[N, 3, H, W]`` float32 in 0..1, and height and width of each without what was added, ``[N, 2]`` int64.

    Raises:
        InputError: there is no image, or one is no such array.
    """
    if not len(images):
        raise InputError("images holds none; give a list of arrays [H, W, 3] of uint8.")
    for number, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            what = (
                f"of {image.dtype} and shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            )
            raise InputError(f"image {number} is {what}; give arrays [H, W, 3] of uint8, RGB in 0..255.")
    made = [_resized(image, resize) for image in images]
    sizes = np.array([image.shape[1:] for image in made], dtype=np.int64)
    height, width = (math.ceil(side / resize["multiple"]) * resize["multiple"] for side in sizes.max(axis=0))
    batch = np.zeros((len(made), 3, height, width), dtype=np.float32)
    for place, image in zip(batch, made, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def _resized(image: np.ndarray, resize: Mapping[str, Any]) -> np.ndarray:
    height, width = image.shape[:2]
    size = resize.get("fixed")
    if size is None:
        scale = min(resize["min_size"] / min(height, width), resize["max_size"] / max(height, width))
        size = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    return bilinear(image.transpose(2, 0, 1).astype(np.float32) / np.float32(255), size)


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values ``[..., h, w]`` resized to ``[..., *size]``, as ``torch.nn.functional.interpolate`` does it."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = values.shape[axis]
        if new == old:
            continue
        step = np.float32(old) / np.float32(new)
        places = np.maximum(step * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        before = np.minimum(places.astype(np.int64), old - 1)
        share = (places - before).astype(np.float32)
        share = share[:, None] if axis == -2 else share
        low, high = values.take(before, axis=axis), values.take(np.minimum(before + 1, old - 1), axis=axis)
        values = low + share * (high - low)
    return values


def found_of(
    outputs: Mapping[str, np.ndarray], sizes: np.ndarray, originals: Sequence[tuple[int, int]], facts: Mapping[str, Any]
) -> list[Found]:
    """Detections in pixels of the images, of what a file returned.

    Args:
        outputs: ``boxes`` [N, D, 4] in pixels of the resized images, ``labels`` and ``scores`` [N, D], and ``masks``
            [N, D, R, R] where it has them.
        sizes: of the resized images, ``[N, 2]`` height and width.
        originals: height and width of each image.
        facts: of the file.
    """
    found = []
    for number, (size, original) in enumerate(zip(sizes, originals, strict=True)):
        mine = {name: output[number] for name, output in outputs.items()}
        there = np.flatnonzero(mine["scores"] > 0)
        if facts["nms"] == "outside":
            there = there[suppressed(mine["boxes"][there], mine["labels"][there], mine["scores"][there], facts)]
        mine = {name: output[there] for name, output in mine.items()}
        ratio = np.asarray(original, dtype=np.float32) / size.astype(np.float32)
        mine["boxes"] = mine["boxes"] * ratio[[1, 0, 1, 0]]
        if "masks" in mine:
            mine["masks"] = pasted(mine["masks"], mine["boxes"], original)
        found.append(mine)
    return found


def suppressed(boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    """Which detections the last non-maximum suppression keeps, class by class, the highest scores first."""
    order = np.argsort(-scores, kind="stable")
    boxes, labels = boxes[order].astype(np.float64), labels[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    stays = np.ones(len(order), dtype=bool)
    for place in range(len(order)):
        if stays[place]:
            others = place + 1 + np.flatnonzero(stays[place + 1 :] & (labels[place + 1 :] == labels[place]))
            sides = np.minimum(boxes[place, 2:], boxes[others, 2:]) - np.maximum(boxes[place, :2], boxes[others, :2])
            common = sides.clip(min=0).prod(axis=1)
            with np.errstate(invalid="ignore"):
                stays[others[common / (areas[place] + areas[others] - common) > facts["nms_iou"]]] = False
    return order[stays][: facts["detections"]]


def pasted(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks ``[M, R, R]`` of boxes ``[M, 4]`` in images of a size (height, width), as torchvision: ``[M, H, W]``."""
    side, (height, width) = masks.shape[-1], size
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    centers, halves = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
    corners = np.concatenate((centers - halves, centers + halves), axis=1).astype(np.int64)
    whole = np.zeros((len(masks), height, width), dtype=np.float32)
    for place, mask, (left, top, right, bottom) in zip(whole, padded, corners.tolist(), strict=True):
        mask = bilinear(mask, (max(bottom - top + 1, 1), max(right - left + 1, 1)))
        rows, columns = slice(max(top, 0), min(bottom + 1, height)), slice(max(left, 0), min(right + 1, width))
        place[rows, columns] = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return whole
