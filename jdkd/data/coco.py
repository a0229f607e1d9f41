"""See :class:`CocoDetectionDataset`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from jdkd.data.annotations import Annotations
from jdkd.data.checking import inspect_split
from jdkd.data.images import read_image
from jdkd.data.masks import Segmentations
from jdkd.data.problems import refuse
from jdkd.data.splits import Split
from jdkd.errors import InputError

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class CocoDetectionDataset(Dataset):
    """A COCO-format split, checked on opening: annotations, and of every image the header and the end of the file.

    Boxes without area or outside their image are left out, boxes over its edge are cut, and areas that cannot be
    are replaced by the box's; of each kind, the count and three examples are said once. Every image is kept, also
    one without any box (its target is empty: it trains the background and counts in validation). Crowd regions are
    never trained on; the ground truth :attr:`coco` keeps them as regions to ignore. Labels are 1..K in order of
    category id, so gaps between category ids do not matter.

    Item ``i`` is ``(image, target)``: image [3, H, W] uint8; target ``{"boxes": [M, 4] float32 xyxy in pixels,
    "labels": [M] int64 in 1..K, "image_id": int}``, and after :meth:`with_masks` ``"masks"``, [M, H, W] uint8 of 0 and
    1. :func:`jdkd.data.images.read_image` decodes the pixels.

    Args:
        split: where images and annotations lie, and whether to refuse what would be put right.
        progress: called with how many of how many images are checked.

    Attributes:
        classes: the K class names in order of label.
        image_ids: the images' ids in order of index.
        label_to_category: category id of each label; index 0 (background) is -1.
        masks: whether targets and :attr:`coco` have masks.
        mirror_symmetric: whether a mirrored object is still of its class; False if the annotation file's
            ``info`` says ``{"mirror_symmetric": false}`` (digits, text), then training must not flip.

    Raises:
        InputError: the annotations are unusable (:func:`jdkd.data.annotations.inspect_annotations`), or images
            are missing, truncated or of another size; reading an item raises it for an image that cannot be decoded.
    """

    def __init__(self, split: Split, progress: Callable[[int, int], object] | None = None) -> None:
        self.split = split
        found = inspect_split(split, progress=progress)
        refuse(found.problems, split.strict)
        self._all = cast(Annotations, found.annotations)  # as there are no problems
        self._files = found.files  # [N] relative to the images folder
        self._segmentations = Segmentations(split.annotations, self._all, split.strict)
        self.masks = False
        self._rows = np.arange(len(self._all.image_ids))  # [n] rows of _all that this data set shows

    @property
    def classes(self) -> tuple[str, ...]:
        return self._all.classes

    @property
    def label_to_category(self) -> list[int]:
        return [-1, *self._all.categories.tolist()]

    @property
    def image_ids(self) -> list[int]:
        return self._all.image_ids[self._rows].tolist()

    @property
    def sizes(self) -> list[tuple[str, int, int]]:
        """(file name, height, width) of each image, as the annotations have them."""
        return [(self._all.file_names[row], *self._all.sizes[row].tolist()[::-1]) for row in self._rows]

    @property
    def landscape(self) -> np.ndarray:
        """[n] bool, whether each image is at least as wide as it is high, as the annotations have it."""
        width, height = self._all.sizes[self._rows].T
        return width >= height

    @property
    def files(self) -> list[Path]:
        """Where the images lie, in order of index."""
        return [self.split.images / self._files[row] for row in self._rows]

    @property
    def labels(self) -> list[np.ndarray]:
        """Labels [M] of each image's boxes, in order of index; no image is read."""
        return [self._all.labels[self._all.offsets[row] : self._all.offsets[row + 1]] for row in self._rows]

    @property
    def mirror_symmetric(self) -> bool:
        return self._all.info.get("mirror_symmetric") is not False

    @cached_property
    def coco(self) -> COCO:
        """The ground truth of the shown images for pycocotools: boxes (and masks) as trained on, and crowd regions."""
        return _ground_truth(self._all, self._rows, self._segmentations.truth if self.masks else None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, as 64 hexadecimal digits, of what the shown data are: two data sets that train alike have one.

        It covers the classes and, image by image in order, id, file name inside its folder, size, boxes and labels
        after cleaning, and the masks where targets have them. Where the files lie, how the JSON is laid out and the
        pixels are not part of it.
        """
        found, rows = self._all, self._rows
        names = [found.file_names[row].replace("\\", "/") for row in rows]
        counts = found.offsets[rows + 1] - found.offsets[rows]
        shift = found.offsets[rows] - (np.cumsum(counts) - counts)  # from a box's place here to its place in the file
        mine = np.arange(counts.sum()) + np.repeat(shift, counts)
        columns = (
            (found.image_ids[rows], "<i8"),
            (found.sizes[rows], "<i8"),
            (counts, "<i8"),
            (found.boxes[mine], "<f4"),
            (found.labels[mine], "<i8"),
        )
        digest = hashlib.sha256(json.dumps([self.classes, names]).encode())
        for column, kind in columns:
            digest.update(column.astype(kind).tobytes())
        for row in rows if self.masks else ():
            digest.update(b" ".join(self._segmentations.of(int(row))))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        row = self._rows[index]
        image = read_image(self.split.images / self._files[row], tuple(self._all.sizes[row].tolist()))
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any]:
        """What belongs to an image, which is not read."""
        row = self._rows[index]
        mine = slice(self._all.offsets[row], self._all.offsets[row + 1])
        target = {
            "boxes": torch.from_numpy(self._all.boxes[mine].copy()),  # [M, 4]
            "labels": torch.from_numpy(self._all.labels[mine].copy()),  # [M]
            "image_id": int(self._all.image_ids[row]),
        }
        if self.masks:
            target["masks"] = self._segmentations.decode(row)  # [M, H, W]
        return target

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"CocoDetectionDataset({len(self)} images, {len(self.classes)} classes, {self.split.annotations})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is derived behind when a worker process or a subset gets a copy; it is made anew if asked for."""
        return {key: value for key, value in self.__dict__.items() if key not in ("coco", "fingerprint")}

    @property
    def segmented(self) -> bool:
        """Whether any box of the annotation file has a segmentation that can be used; reads them all."""
        return self._segmentations.given > 0

    def with_masks(self) -> CocoDetectionDataset:
        """The same images with ``masks`` in their targets, out of polygons and run lengths.

        Boxes, labels and their order are those of this data set. A mask ends where the image does; a box without a
        segmentation, with one that cannot be read, or with one that has no pixel in it, is masked whole, which is said.

        Raises:
            InputError: no box has a segmentation that can be used, or the annotation file has changed meanwhile.
        """
        self._segmentations.require()
        masked = copy.copy(self)
        masked.masks = True
        return masked

    def known_as(self, fingerprint: str) -> bool:
        """Whether a :attr:`fingerprint` is of these images, with masks or without: a detector of either saw them all.

        Where it is not that of this data set, and that has no masks, all segmentations are read.
        """
        if fingerprint == self.fingerprint:
            return True
        other = copy.copy(self)
        other.masks = not self.masks
        with contextlib.suppress(InputError):  # segmentations that a strict split refuses
            return other.fingerprint == fingerprint
        return False

    def subset(self, indices: Iterable[int]) -> CocoDetectionDataset:
        """Show only some of the images, in the given order; the ground truth is restricted to them.

        Args:
            indices: which of this data set's images, each at most once.

        Raises:
            InputError: no index, a repeated index, or one outside ``0..len - 1``.
        """
        chosen = [int(index) for index in indices]
        if not chosen:
            raise InputError(f"a subset of {self} needs at least one index; got none")
        wrong = [index for index in chosen if not 0 <= index < len(self)]
        if wrong or len(set(chosen)) < len(chosen):
            what = f"index {wrong[0]} is outside 0..{len(self) - 1}" if wrong else "an index is repeated"
            raise InputError(f"cannot take a subset of {self}: {what}; give distinct indices inside the data set")
        subset = copy.copy(self)
        subset._rows = self._rows[chosen]
        return subset


def _ground_truth(found: Annotations, rows: np.ndarray, masks: Sequence[bytes] | None) -> COCO:
    """Index the annotations of the images in some rows for pycocotools.

    pycocotools takes annotation id 0 for "unmatched", so where an id is below 1 all are renumbered. ``masks`` [G] are
    run lengths.
    """
    from pycocotools.coco import COCO

    truth = found.truth
    shown = np.flatnonzero(np.isin(truth.rows, rows))
    ids = truth.ids[shown]
    if ids.min(initial=1) < 1:
        ids = np.arange(1, len(shown) + 1)
    columns = {
        "id": ids,
        "image_id": found.image_ids[truth.rows[shown]],
        "category_id": found.categories[truth.labels[shown] - 1],
        "bbox": truth.boxes[shown],
        "area": truth.areas[shown],
        "iscrowd": truth.crowd[shown].astype(int),
    }
    columns = {name: column.tolist() for name, column in columns.items()}
    if masks is not None:
        sizes = found.sizes[truth.rows[shown]].tolist()
        columns["segmentation"] = [
            {"size": [height, width], "counts": masks[place]}
            for place, (width, height) in zip(shown.tolist(), sizes, strict=True)
        ]
    coco = COCO()
    coco.dataset = {
        "info": found.info,
        "images": [
            {"id": int(found.image_ids[row]), "file_name": found.file_names[row], "width": width, "height": height}
            for row in np.sort(rows).tolist()
            for width, height in [found.sizes[row].tolist()]
        ],
        "categories": [
            {"id": number, "name": name} for number, name in zip(found.categories.tolist(), found.classes, strict=True)
        ],
        "annotations": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
