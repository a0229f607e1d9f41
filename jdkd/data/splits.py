"""See :func:`resolve_splits`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jdkd.errors import InputError

ANNOTATIONS = "annotations/instances_{split}2017.json"  # in a folder in the COCO layout


@dataclass(frozen=True)
class Split:
    """Where the images and the annotation file of one split lie.

    Attributes:
        images: folder of the images.
        annotations: COCO annotation file.
        name: "train", "val" or "selection", by which messages name its flags and records its folders.
        strict: refuse what would otherwise be put right on reading.
    """

    images: Path
    annotations: Path
    name: str = ""
    strict: bool = False


def resolve_splits(
    data: str | os.PathLike | None = None,
    train_images: str | os.PathLike | None = None,
    train_annotations: str | os.PathLike | None = None,
    val_images: str | os.PathLike | None = None,
    val_annotations: str | os.PathLike | None = None,
    strict: bool = False,
) -> tuple[Split, Split]:
    """Find the training and the validation split of a COCO-format data set.

    Args:
        data: a folder in the COCO layout (``annotations/instances_{train,val}2017.json``, ``train2017/``,
            ``val2017/``); needed for whatever the other four do not name.
        train_images: folder of the training images.
        train_annotations: annotation file of the training images.
        val_images: folder of the validation images.
        val_annotations: annotation file of the validation images.
        strict: refuse boxes without area or over the edge of their image instead of putting them right.

    Returns:
        The two splits, whose folders and files exist.

    Raises:
        InputError: something is not given or does not exist.
    """
    train = resolve_split("train", data, train_images, train_annotations, strict)
    return train, resolve_split("val", data, val_images, val_annotations, strict)


def resolve_split(
    name: str,
    data: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    strict: bool = False,
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
        what = "is a file" if Path(data).is_file() else "does not exist"
        raise InputError(
            f"--data {data} {what}; give a folder in the COCO layout, or name the {name} split's files with "
            f"{flags[0]} and {flags[1]}"
        )
    folder = Path() if data is None else Path(data)
    split = Split(
        images=folder / f"{name}2017" if images is None else Path(images),
        annotations=folder / ANNOTATIONS.format(split=name) if annotations is None else Path(annotations),
        name=name,
        strict=strict,
    )
    if not split.annotations.is_file():
        raise InputError(
            f"annotation file {split.annotations} does not exist ({_there(split.annotations.parent, data)}); name "
            f"the {name} split's file with {flags[1]}, and the folder of its images with {flags[0]}"
        )
    if not split.images.is_dir():
        raise InputError(f"image folder {split.images} does not exist; name the {name} split's folder with {flags[0]}")
    return split


def _there(beside: Path, data: str | os.PathLike | None) -> str:
    """Which files could be meant by an annotation file that does not exist, in words."""
    found = {*beside.glob("*.json")}
    if data is not None:
        found.update(file for pattern in ("*.json", "*/*.json") for file in Path(data).glob(pattern))
    return f"there is {', '.join(map(str, sorted(found)[:5]))}" if found else f"{beside} holds no .json file"


def whereabouts(splits: Mapping[str, Split]) -> dict[str, str]:
    """Absolute paths of splits under their names, for the record of a run."""
    return {
        f"{name}_{part}": str(getattr(split, part).resolve())
        for name, split in splits.items()
        for part in ("images", "annotations")
    }
