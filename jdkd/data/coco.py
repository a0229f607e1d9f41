"""See :func:`resolve_splits` and :class:`CocoDetectionDataset`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from jdkd.data.annotations import Annotations, read_annotations
from jdkd.data.images import read_image
from jdkd.errors import InputError

if TYPE_CHECKING:
    from pycocotools.coco import COCO


@dataclass(frozen=True)
class Split:
    """Where the images and the annotation file of one split lie.

    ``name`` ("train" or "val") only serves to name the flags in messages.
    """

    images: Path
    annotations: Path
    name: str = ""


def resolve_splits(
    data: str | os.PathLike | None = None,
    train_images: str | os.PathLike | None = None,
    train_annotations: str | os.PathLike | None = None,
    val_images: str | os.PathLike | None = None,
    val_annotations: str | os.PathLike | None = None,
) -> tuple[Split, Split]:
    """Find the training and the validation split of a COCO-format data set.

    Args:
        data: a folder in the COCO layout (``annotations/instances_{train,val}2017.json``, ``train2017/``,
            ``val2017/``); needed for whatever the other four do not name.
        train_images: folder of the training images.
        train_annotations: annotation file of the training images.
        val_images: folder of the validation images.
        val_annotations: annotation file of the validation images.

    Returns:
        The two splits, whose folders and files exist.

    Raises:
        InputError: something is not given or does not exist.
    """
    train = resolve_split("train", data, train_images, train_annotations)
    return train, resolve_split("val", data, val_images, val_annotations)


def resolve_split(
    name: str,
    data: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
) -> Split:
    """Find one split, ``name`` being "train" or "val"; see :func:`resolve_splits`."""
    flags = f"--{name}-images", f"--{name}-annotations"
    if data is None and (images is None or annotations is None):
        missing = [flag for flag, value in zip(flags, (images, annotations), strict=True) if value is None]
        raise InputError(
            f"no {name} data: neither --data nor {' and '.join(missing)} is given; "
            f"give --data DIR in the COCO layout, or both {flags[0]} and {flags[1]}"
        )
    if data is not None and not Path(data).is_dir() and (images is None or annotations is None):
        raise InputError(f"--data {data} is not a folder; give an existing folder in the COCO layout")
    split = Split(
        images=Path(images) if images is not None else Path(data) / f"{name}2017",
        annotations=Path(annotations) if annotations is not None else _default_annotations(Path(data), name),
        name=name,
    )
    if not split.annotations.is_file():
        folder = split.annotations.parent
        found = sorted(path.name for path in folder.glob("*.json"))
        beside = f"{folder} holds {', '.join(found[:5])}" if found else f"{folder} holds no .json file"
        raise InputError(f"annotation file {split.annotations} does not exist ({beside}); name it with {flags[1]}")
    if not split.images.is_dir():
        raise InputError(f"image folder {split.images} does not exist; name the folder with {flags[0]}")
    return split


def _default_annotations(data: Path, name: str) -> Path:
    return data / "annotations" / f"instances_{name}2017.json"


class CocoDetectionDataset(Dataset):
    """A COCO-format split, checked on opening.

    Every image is kept, also one without any box (its target is empty: it trains the background and counts in
    validation). Crowd regions are never trained on; the ground truth :attr:`coco` keeps them as regions to
    ignore. Labels are 1..K in order of category id, so gaps between category ids do not matter.

    Item ``i`` is ``(image, target)``: image [3, H, W] uint8; target ``{"boxes": [M, 4] float32 xyxy in pixels,
    "labels": [M] int64 in 1..K, "image_id": int}``. How pixels are decoded says
    :func:`jdkd.data.images.read_image`.

    Args:
        split: where images and annotations lie.

    Attributes:
        classes: the K class names in order of label.
        image_ids: the images' ids in order of index.
        label_to_category: category id of each label; index 0 (background) is -1.
        mirror_symmetric: whether a mirrored object is still of its class; False if the annotation file's
            ``info`` says ``{"mirror_symmetric": false}`` (digits, text), then training must not flip.

    Raises:
        InputError: the annotations are unusable (:func:`jdkd.data.annotations.read_annotations`) or images are
            missing; reading an item raises it for a truncated image or one of another size.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._all: Annotations = read_annotations(split.annotations)
        self._rows = np.arange(len(self._all.image_ids))  # [n] rows of _all that this data set shows
        _require_files(split, self._all.file_names)

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
    def mirror_symmetric(self) -> bool:
        info = self._all.raw.get("info")
        return not (isinstance(info, dict) and info.get("mirror_symmetric") is False)

    @cached_property
    def coco(self) -> COCO:
        """The ground truth of the shown images for pycocotools, without segmentations."""
        return _ground_truth(self._all.raw, set(self.image_ids))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, as 64 hexadecimal digits, of what the shown data are: two data sets that train alike have one.

        It covers the classes and, image by image in order, id, file name inside its folder, size, boxes and labels
        after cleaning. Where the files lie, how the JSON is laid out and the pixels are not part of it.
        """
        found, rows = self._all, self._rows
        names = [found.file_names[row].replace("\\", "/") for row in rows]
        mine = [slice(found.offsets[row], found.offsets[row + 1]) for row in rows]
        columns = (
            (found.image_ids[rows], "<i8"),
            (found.sizes[rows], "<i8"),
            (found.offsets[rows + 1] - found.offsets[rows], "<i8"),
            (np.concatenate([found.boxes[part] for part in mine]), "<f4"),
            (np.concatenate([found.labels[part] for part in mine]), "<i8"),
        )
        digest = hashlib.sha256(json.dumps([self.classes, names]).encode())
        for column, kind in columns:
            digest.update(column.astype(kind).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        row = self._rows[index]
        width, height = self._all.sizes[row].tolist()
        image = read_image(self.split.images / self._all.file_names[row], width, height)
        mine = slice(self._all.offsets[row], self._all.offsets[row + 1])
        target = {
            "boxes": torch.from_numpy(self._all.boxes[mine].copy()),  # [M, 4]
            "labels": torch.from_numpy(self._all.labels[mine].copy()),  # [M]
            "image_id": int(self._all.image_ids[row]),
        }
        return image, target

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"CocoDetectionDataset({len(self)} images, {len(self.classes)} classes, {self.split.annotations})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is derived behind when a worker process or a subset gets a copy; it is made anew if asked for."""
        return {key: value for key, value in self.__dict__.items() if key not in ("coco", "fingerprint")}

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


def _require_files(split: Split, file_names: list[str]) -> None:
    """Check that all images exist with one listing per folder instead of one look per file."""
    present: dict[Path, set[str]] = {}

    def exists(file_name: str) -> bool:
        path = split.images / file_name
        if path.parent not in present:
            with contextlib.suppress(OSError):
                present[path.parent] = set(os.listdir(path.parent))
        return path.name in present.setdefault(path.parent, set())

    missing = [file_name for file_name in file_names if not exists(file_name)]
    if missing:
        flag = f"--{split.name}-images" if split.name else "the images folder"
        raise InputError(
            f"{len(missing)} of the {len(file_names)} images in {split.annotations} are missing, the first is "
            f"{split.images / missing[0]}; put them there or correct {flag}"
        )


def _ground_truth(raw: dict[str, Any], image_ids: set[int]) -> COCO:
    """Index the annotations of some images for pycocotools.

    pycocotools takes annotation id 0 for "unmatched", so ids below 1 are renumbered; it needs an area and
    ``iscrowd`` on every annotation, which are filled in where the file has none.
    """
    from pycocotools.coco import COCO

    annotations = [record for record in raw["annotations"] if record["image_id"] in image_ids]
    renumber = min((record["id"] for record in annotations), default=1) < 1
    coco = COCO()
    coco.dataset = {
        "info": raw.get("info", {}),
        "images": [record for record in raw["images"] if record["id"] in image_ids],
        "categories": raw["categories"],
        "annotations": [
            {
                **record,
                "id": number if renumber else record["id"],
                "iscrowd": int(bool(record.get("iscrowd", 0))),
                "area": record["bbox"][2] * record["bbox"][3] if record.get("area") is None else record["area"],
            }
            for number, record in enumerate(annotations, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
