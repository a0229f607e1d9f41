"""See :func:`clean`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jdkd.data.records import Records

ROUNDING = 0.02
"""Pixels that a box may reach over the edge of its image without a word: COCO rounds corner and side to 0.01."""

LEAST_SIDE = 2.0**-20
"""Of the image's side. A box must be wider than this, or it vanishes in float32 when it is mirrored or scaled."""


def clean(
    annotations: Records, boxes: np.ndarray, sizes: np.ndarray, crowd: np.ndarray, image_name: Callable[[int], str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut boxes to their images, find those of which nothing is left, and say so of each kind.

    Crowd regions are left as they are: they are only ever ignored.

    Args:
        annotations: the records; those that are not sound are left out without a word.
        boxes: [A, 4] float64, x, y, width and height in pixels.
        sizes: [A, 2] width and height of each annotation's image in pixels.
        crowd: [A] bool.
        image_name: of an annotation at a place, how its image is called in messages.

    Returns:
        corners: [A, 4] float64 xyxy in pixels, inside the image.
        kept: [A] bool, the sound boxes that have an area.
        areas: [A] float64 px^2; the given ones, or the cut box's where none is given or the given one cannot be.
    """
    corners = corners_of(boxes)
    limit = np.concatenate([sizes, sizes], axis=1)  # [A, 4]
    inside = np.clip(corners, 0, limit)
    checked = annotations.sound & ~crowd
    if _are_fractions(corners[checked], sizes[checked]):
        annotations.fault(
            "boxes given as fractions of their image",
            checked,
            lambda place: f"and all others lie within 1 px: {annotations.column('bbox')[place]}",
            "give x and width times the image's width, y and height times its height",
        )
        checked = annotations.sound & ~crowd
    empty = checked & _vanishing(corners, sizes)
    outside = checked & ~empty & _vanishing(inside, sizes)
    kept = checked & ~empty & ~outside
    over = kept & (np.abs(corners - inside).max(axis=1, initial=0) > ROUNDING)

    def describe(place: int) -> str:
        shown = ", ".join(f"{number:g}" for number in boxes[place])
        width, height = sizes[place]
        return f"[{shown}] in {image_name(place)} of {width} x {height} px"

    if _would_fit_as_corners(boxes[over], sizes[over]):
        clipped = "clipped, though all of them fit as [left, top, right, bottom]: convert them if that is meant"
    else:
        clipped = "clipped"
    annotations.repair("boxes without area", empty, describe, "left out")
    annotations.repair("boxes outside their image", outside, describe, "left out")
    annotations.repair("boxes over the edge of their image", over, describe, clipped)
    return inside, kept, _areas(annotations, boxes, inside, kept)


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """From x, y, width and height to left, top, right and bottom, [A, 4]; what ends too far off ends at infinity."""
    with np.errstate(over="ignore"):
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _vanishing(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return (corners[:, 2:] - corners[:, :2] <= LEAST_SIDE * sizes).any(axis=1)


def _would_fit_as_corners(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether these boxes, given as corner and size, look like two corners."""
    fits = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes)
    return len(boxes) > 1 and bool(fits.all())


def _are_fractions(corners: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes, several in images of more than 2 px, all lie within one pixel, as those of YOLO's files do."""
    within = (np.abs(corners) <= 1).all() and (corners % 1 != 0).any()
    return len(corners) > 1 and bool(within and (sizes > 2).all())


def _areas(annotations: Records, boxes: np.ndarray, inside: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The area of each annotation for COCO's small, medium and large.

    The area of a segmentation is smaller than its box, at any ratio. The largest that a box can be said to have
    counts the pixels of both edges, as Pascal VOC does: (width + 1) * (height + 1).
    """
    values = annotations.column("area")
    given = np.array([_number(value) for value in values])  # [A]
    absent = np.array([value is None for value in values], dtype=bool)  # null as well as nothing

    def possible(sides: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return (given > 0) & (given <= (sides + 1).prod(axis=1))

    wrong = kept & ~absent & ~possible(boxes[:, 2:])

    def describe(place: int) -> str:
        return f"has area {values[place]!r}, its box {boxes[place, 2]:g} x {boxes[place, 3]:g} px"

    annotations.repair("areas that cannot be", wrong, describe, "replaced by the area of the box")
    sides = inside[:, 2:] - inside[:, :2]
    return np.where(possible(sides), given, sides.prod(axis=1))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return np.nan
    return float(value) if abs(value) < 1e300 else np.nan
