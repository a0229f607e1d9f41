"""See :class:`Segmentations`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jdkd.data.annotations import Annotations
from jdkd.data.index import Texts, index_of, text_as_arrays
from jdkd.data.problems import Problem, recalled, refuse, remembered
from jdkd.data.stream import Unusual, read_object
from jdkd.errors import InputError

FARTHEST = 10  # sides of the image that a corner may lie from it; the library traces polygons pixel by pixel
DONE = "taken for the whole box where masks are asked for"


class Segmentations:
    """The masks of a data set's annotations, read from its file when they are first asked for.

    Polygons and run lengths become run lengths at the size of the image (COCO's, by pycocotools), a few hundred bytes
    an object; only :meth:`decode` gives pixels. An object whose segmentation is missing, cannot
    be read or has no pixel in its box gets its whole box for a mask, so that masks and boxes are always of the same
    objects; of each kind, the count and three examples are said once. Crowd regions get theirs without a word.

    Args:
        path: the annotation file.
        found: what was read of it before.
        strict: refuse what would be put right.
    """

    def __init__(self, path: Path, found: Annotations, strict: bool = False) -> None:
        self.path, self.found, self.strict = path, found, strict

    @property
    def given(self) -> int:
        """How many objects, crowd regions aside, have a segmentation that can be used."""
        return self._read.given

    @property
    def truth(self) -> Sequence[bytes]:
        """[G] COCO's compressed run lengths of the ground truth."""
        return self._read.lengths

    def of(self, row: int) -> list[bytes]:
        """COCO's compressed run lengths of an image's boxes, in the order of the boxes."""
        first, last = self.found.offsets[row : row + 2].tolist()
        return [self.truth[place] for place in self._of_boxes[first:last]]

    def decode(self, row: int) -> torch.Tensor:
        """The masks of an image's boxes, uint8 0 or 1 [M, H, W], in the order of the boxes."""
        width, height = self.found.sizes[row].tolist()
        masks = np.zeros((len(lengths := self.of(row)), width, height), dtype=np.uint8)  # run lengths go down columns
        for pixels, counts in zip(masks, lengths, strict=True):
            runs = decompressed(counts)
            pixels.reshape(-1)[:] = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
        return torch.from_numpy(masks).mT.contiguous()

    def require(self) -> None:
        """Refuses data where no object has a segmentation that can be used.

        Raises:
            InputError: that is so.
        """
        if not self.given:
            found = [problem.describe(problem.places[0]) for problem in self._read.problems]
            example = f" that can be used ({found[0]})" if found else ""
            raise InputError(
                f"{self.path}: none of its {len(self.found.boxes):,} boxes has a segmentation{example}, and masks are "
                "asked for; give annotations with segmentations, or take a detector without masks"
            )

    @cached_property
    def _of_boxes(self) -> list[int]:
        """[A] where in the ground truth each box is."""
        objects = np.flatnonzero(~self.found.truth.crowd)
        return objects[np.argsort(self.found.truth.rows[objects], kind="stable")].tolist()

    @cached_property
    def _read(self) -> Reading:
        read = open_segmentations(self.path, self.found)
        if read.given:
            refuse(read.problems, self.strict)
        return read

    def __getstate__(self) -> dict[str, Any]:
        """What is kept on disk is opened again in another process, not sent to it."""
        derived = ("_read", "_of_boxes") if self.found.index else ()
        return {name: value for name, value in vars(self).items() if name not in derived}


class Reading(NamedTuple):
    """What :func:`read_segmentations` makes of an annotation file."""

    lengths: Sequence[bytes]  # [G] COCO's compressed run lengths, of the box where there is no usable segmentation
    given: int  # how many objects, crowd regions aside, have a usable one
    problems: list[Problem]  # what was put right; that segmentations are missing is none where all are


def open_segmentations(path: Path, found: Annotations) -> Reading:
    """The same as :func:`read_segmentations`, where annotations have an index out of one of their own."""
    index = found.index and index_of(path, "masks")
    if index and index.key == found.index.key:
        kept = index.read()
        if kept is None:
            read = read_segmentations(path, found)
            content, ends = text_as_arrays(read.lengths)
            facts = {"given": read.given, "problems": [remembered(problem) for problem in read.problems]}
            if (kept := index.write({"content": content, "ends": ends}, facts)) is None:
                return read
        problems = [recalled(path, problem) for problem in kept.facts["problems"]]
        return Reading(Texts(kept.arrays["content"], kept.arrays["ends"]), kept.facts["given"], problems)
    return read_segmentations(path, found)


def read_segmentations(path: Path, found: Annotations) -> Reading:
    """Reads the segmentation of every object of the ground truth.

    Args:
        path: the annotation file.
        found: what was read of it before.

    Raises:
        InputError: the file is not what it was.
    """
    truth, sizes = found.truth, found.sizes[found.truth.rows]  # [G, 2] width and height
    pixels = _pixels_of(truth.boxes, sizes)  # [G, 4]
    read: dict[int, dict[str, Any]] = {}
    missing, faults = [], {}
    for place, segmentation in _raw_segmentations(path, truth.ids.tolist()):
        if segmentation is None or segmentation == []:
            missing.append(place)
            continue
        try:
            width, height = sizes[place].tolist()
            read[place] = _run_lengths(segmentation, height, width)
        except _Unreadable as fault:
            faults[place] = str(fault)
    outside = _missing_their_box(read, pixels)
    usable = read.keys() - outside
    lengths = [
        read[place]["counts"] if place in usable else _rectangle(pixels[place], *sizes[place].tolist())
        for place in range(len(pixels))
    ]

    def name(place: int) -> str:
        width, height = sizes[place]
        return f"annotation {truth.ids[place]} in {found.file_names[truth.rows[place]]} of {width} x {height} px"

    def with_box(place: int) -> str:
        return f"{name(place)}, box [{', '.join(f'{side:g}' for side in truth.boxes[place])}]"

    given = int((~truth.crowd[list(usable)]).sum())
    kinds = {
        "segmentations that cannot be read": (faults, lambda place: f"{name(place)} {faults[place]}"),
        "segmentations without a pixel in their box": (outside, with_box),
        "boxes without a segmentation": (missing if given else (), name),
    }
    bad = {kind: [place for place in sorted(places) if not truth.crowd[place]] for kind, (places, _) in kinds.items()}
    total = int((~truth.crowd).sum())
    problems = [
        Problem(kind, path, bad[kind], describe, DONE, "repair", total)
        for kind, (_, describe) in kinds.items()
        if bad[kind]
    ]
    return Reading(lengths, given, problems)


class _Unreadable(Exception):
    """A segmentation that is none; its text reads on after the annotation's name."""


def _raw_segmentations(path: Path, ids: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """What stands in the file for each object, None where nothing does, by its place among the objects."""
    places: dict[Any, int] = {number: place for place, number in enumerate(ids)}
    try:
        for record in _records(path):
            number = record.get("id") if isinstance(record, dict) else None
            if isinstance(number, int | float) and (place := places.pop(number, None)) is not None:
                yield place, record.get("segmentation")
        if places:
            raise KeyError(next(iter(places)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is no longer the file that was opened ({error!r}); open the data anew") from error


def _records(path: Path) -> Iterator[Any]:
    """The annotations in a file, one by one."""
    try:
        for name, record in read_object(path, ("annotations",)):
            if name == "annotations":
                yield record
    except Unusual:
        yield from json.loads(path.read_text(encoding="utf-8-sig"))["annotations"]


def _run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths of polygons or of run lengths."""
    from pycocotools import mask

    if isinstance(segmentation, dict):
        counts = _counts(segmentation, height, width)
        return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    if not isinstance(segmentation, list):
        raise _Unreadable(f"has the segmentation {segmentation!r:.60}, neither polygons nor run lengths")
    polygons = [_polygon(one, max(height, width)) for one in segmentation]
    polygons = [one for one in polygons if len(one) >= 6]
    if not polygons:
        raise _Unreadable(f"has the segmentation {segmentation!r:.60}, without a polygon of three corners")
    traced = mask.frPyObjects(polygons, height, width)
    return traced[0] if len(traced) == 1 else mask.merge(traced)


def _polygon(given: Any, side: int) -> list[float]:
    """x0, y0, x1, y1, ... in pixels."""
    numbers = np.zeros(0)
    if isinstance(given, list):
        try:
            numbers = np.array(given)  # [2 * corners]
        except (ValueError, TypeError, OverflowError):
            numbers = np.array(["ragged"])
    right = numbers.ndim == 1 and (not len(numbers) or numbers.dtype.kind in "iuf") and len(numbers) % 2 == 0
    if not isinstance(given, list) or not right or not np.isfinite(numbers).all():
        raise _Unreadable(f"has the polygon {given!r:.60}, not a list of x, y, x, y, ... in pixels")
    if len(numbers) and np.abs(numbers).max() > FARTHEST * side + side:
        raise _Unreadable(f"has a polygon that reaches to {np.abs(numbers).max():g} px")
    return numbers.tolist()


def _counts(given: dict[str, Any], height: int, width: int) -> list[int]:
    """The run lengths, zeros first, column by column; they are checked, as the library reads on past their end."""
    size, counts = given.get("size"), given.get("counts")
    if size != [height, width]:
        raise _Unreadable(f"has run lengths of size {size!r:.60}, not of height and width {[height, width]}")
    if isinstance(counts, str):
        counts = decompressed(counts.encode(errors="replace"))
    right = isinstance(counts, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)
    if not right or sum(counts) != height * width:
        total = f", which cover {sum(counts)} of {height * width} pixels" if right else ""
        raise _Unreadable(f"has the run lengths {given.get('counts')!r:.60}{total}")
    return counts


def decompressed(text: bytes) -> list[int] | None:
    """Run lengths out of COCO's text: six bits a letter from "0" on, from the fourth run on as differences.

    Five bits of a letter are the number's, the lowest first, and the sixth says that more follow; the fifth bit of
    the last letter is the sign. The format is that of pycocotools' ``rleToString``; None if the text is not of it.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = letter - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return None if shift else counts


def _pixels_of(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The pixels that boxes touch, [G, 4] int64 left, top, right, bottom; x, y, width and height in."""
    limit = np.concatenate([sizes, sizes], axis=1)
    with np.errstate(over="ignore"):
        corners = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, :2] + boxes[:, 2:])], axis=1)
    return np.clip(corners, 0, limit).astype(np.int64)


def _rectangle(pixels: np.ndarray, width: int, height: int) -> bytes:
    """Run lengths of all pixels of a box."""
    from pycocotools import mask

    left, top, right, bottom = pixels.tolist()
    across, down = max(0, right - left), max(0, bottom - top)
    if not across or not down:
        counts = [height * width]
    else:
        between = [down, height - down] * (across - 1)
        counts = [left * height + top, *between, down, (width - right) * height + height - bottom]
    return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]


def _missing_their_box(read: dict[int, dict[str, Any]], pixels: np.ndarray) -> set[int]:
    """The places whose mask has no pixel where the box is."""
    from pycocotools import mask

    if not read:
        return set()
    places, lengths = np.array(list(read)), list(read.values())  # [n]
    around, boxes = mask.toBbox(lengths), pixels[places]  # [n, 4] x, y, width and height; corners
    apart = (around[:, :2] >= boxes[:, 2:]) | (around[:, :2] + around[:, 2:] <= boxes[:, :2])  # [n, 2]
    empty = np.array([mask.area(one) == 0 for one in lengths])  # of more than 255 at once, mask.area makes an error
    return set(places[empty | apart.any(axis=1)].tolist())
