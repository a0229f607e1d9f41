"""See :func:`read_annotations`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jdkd.errors import InputError

# Real COCO boxes overhang their image by rounding; up to this many pixels are cut off, more is an error.
OVERHANG = 2.0

# The only two annotations of COCO's own instances_train2017.json without height, as (annotation id, image id).
# They are left out, so that the published file opens; any other box without area is an error.
PUBLISHED_SLIPS = ((918, 200365), (2206849, 550395))


@dataclass(frozen=True)
class Annotations:
    """A checked COCO annotation file as flat arrays, images in order of their id.

    Boxes ``offsets[i]:offsets[i + 1]`` belong to image ``i``. Crowd regions are in ``raw`` only.
    """

    raw: dict[str, Any]  # the file itself, without segmentations
    image_ids: np.ndarray  # [N] int64, ascending
    file_names: list[str]  # [N], relative to the images folder
    sizes: np.ndarray  # [N, 2] int64, width and height
    classes: tuple[str, ...]  # [K] names in order of category id
    categories: np.ndarray  # [K] int64, ascending
    boxes: np.ndarray  # [A, 4] float32 xyxy in pixels, inside the image
    labels: np.ndarray  # [A] int64 in 1..K
    offsets: np.ndarray  # [N + 1] int64


def read_annotations(path: Path) -> Annotations:
    """Read a COCO annotation file and check all of it at once.

    The checks run on whole columns, so that COCO's 860,000 annotations take seconds. Segmentations are
    dropped after reading: they are most of the memory and box detection never looks at them.

    Args:
        path: a COCO "instances" JSON file.

    Returns:
        The file as flat arrays; boxes that overhang the image by at most :data:`OVERHANG` pixels are cut to it.

    Raises:
        InputError: the file is missing, not JSON, lacks a key, repeats an id, holds no image or no box, or an
            annotation refers to an unknown image or category, lies outside its image or has no area.
    """
    raw = _load(path)
    images, annotations, categories = (raw[key] for key in ("images", "annotations", "categories"))
    if not images:
        raise InputError(f"{path} is an empty split: it lists 0 images; give a file that lists at least one")
    if not categories:
        raise InputError(f"{path} lists 0 categories; give a file that names the classes to detect")

    image_ids = _ids(path, images, "image")
    category_ids = _ids(path, categories, "category")
    annotation_ids = _ids(path, annotations, "annotation")
    order, category_order = np.argsort(image_ids), np.argsort(category_ids)
    sizes = _sizes(path, images)[order]
    file_names = _strings(path, images, "image", "file_name")
    names = _strings(path, categories, "category", "name")
    image_ids, category_ids = image_ids[order], category_ids[category_order]

    rows = _lookup(path, annotations, annotation_ids, "image_id", image_ids)
    labels = _lookup(path, annotations, annotation_ids, "category_id", category_ids) + 1
    boxes = _column(path, annotations, "annotation", "bbox", width=4).astype(np.float64)
    boxes[:, 2:] += boxes[:, :2]
    _column(path, [record for record in annotations if record.get("area") is not None], "annotation", "area")
    crowd = _crowd(path, annotations)
    flat = boxes[:, 3] == boxes[:, 1]
    slips = [flat & (annotation_ids == slip) & (image_ids[rows] == image) for slip, image in PUBLISHED_SLIPS]
    kept = ~(crowd | np.any(slips, axis=0))
    if not kept.any():
        raise InputError(
            f"{path} is an empty split: its {len(images)} images hold no box to detect "
            f"({len(annotations)} annotations, of them {int(crowd.sum())} crowd regions); give an annotated file"
        )
    inside = _clip(path, boxes, sizes[rows], annotation_ids, image_ids[rows], kept)

    by_image = np.argsort(rows, kind="stable")
    by_image = by_image[kept[by_image]]
    return Annotations(
        raw=raw,
        image_ids=image_ids,
        file_names=[file_names[i] for i in order],
        sizes=sizes,
        classes=tuple(names[i] for i in category_order),
        categories=category_ids,
        boxes=inside[by_image].astype(np.float32),
        labels=labels[by_image],
        offsets=np.searchsorted(rows[by_image], np.arange(len(image_ids) + 1)),
    )


@contextmanager
def _no_gc() -> Iterator[None]:
    """Keep the collector from walking millions of fresh, cycle-free records again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load(path: Path) -> dict[str, Any]:
    try:
        with _no_gc(), open(path, encoding="utf-8-sig") as file:
            raw = json.load(file)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); give a COCO annotation file") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give a COCO annotation file") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a {type(raw).__name__}, not an object; give a COCO annotation file")
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list):
            found = "has no" if key not in raw else f"has {type(raw[key]).__name__} instead of a list as"
            raise InputError(f'{path} {found} "{key}"; a COCO annotation file lists images, annotations, categories')
        for place, record in enumerate(raw[key]):
            if not isinstance(record, dict):
                raise InputError(f'"{key}"[{place}] of {path} is {record!r}, not an object; repair or remove it')
    for record in raw["annotations"]:
        record.pop("segmentation", None)
    return raw


def _values(path: Path, records: Sequence[dict], kind: str, key: str) -> list[Any]:
    try:
        return [record[key] for record in records]
    except KeyError:
        place = next(i for i, record in enumerate(records) if key not in record)
        named = f"{kind} {records[place]['id']}" if "id" in records[place] else f"{kind} number {place}"
        raise InputError(f'{named} of {path} has no "{key}"; add it or remove the {kind}') from None


def _column(path: Path, records: Sequence[dict], kind: str, key: str, width: int = 1) -> np.ndarray:
    """Returns the numbers under `key` of all records: [len(records)] or, with a width, [len(records), width]."""
    shape = (len(records),) if width == 1 else (len(records), width)
    values = _values(path, records, kind, key)
    column = _finite(values, shape)
    if column is not None:
        return column
    for record, value in zip(records, values, strict=True):
        if _finite([value], (1, *shape[1:])) is None:
            wanted = "a finite number" if width == 1 else f"a list of {width} finite numbers"
            raise InputError(
                f'"{key}" of {kind} {record.get("id", "without id")} in {path} is {value!r}, not {wanted}; '
                f"correct it or remove the {kind}"
            )
    raise InputError(f'"{key}" of the {kind} records in {path} are not numbers of one kind; make them all numbers')


def _finite(values: list[Any], shape: tuple[int, ...]) -> np.ndarray | None:
    if not values:
        return np.zeros(shape, dtype=np.int64)
    try:
        column = np.array(values)
    except (ValueError, TypeError, OverflowError):
        return None
    right = column.shape == shape and column.dtype.kind in "iuf" and np.isfinite(column).all()
    return column if right else None


def _integers(path: Path, records: Sequence[dict], kind: str, key: str) -> np.ndarray:
    column = _column(path, records, kind, key)
    if column.dtype.kind != "i":
        values = [record[key] for record in records]
        place = next(i for i, v in enumerate(values) if not isinstance(v, int) or abs(v) > np.iinfo(np.int64).max)
        raise InputError(
            f'"{key}" of {kind} number {place} in {path} is {values[place]!r}, not an integer of 64 bits; '
            f"correct it or remove the {kind}"
        )
    return column.astype(np.int64)


def _ids(path: Path, records: Sequence[dict], kind: str) -> np.ndarray:
    """Returns the distinct ids of all records [len(records)] int64."""
    ids = _integers(path, records, kind, "id")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        repeated = unique[counts > 1]
        places = np.flatnonzero(ids == repeated[0])[:2]
        raise InputError(
            f"{kind} id {repeated[0]} stands {counts[counts > 1][0]} times in {path} (records number {places[0]} "
            f"and {places[1]}{_others(len(repeated), 'repeated id')}); give every {kind} an id of its own"
        )
    return ids


def _sizes(path: Path, images: Sequence[dict]) -> np.ndarray:
    sizes = np.stack([_integers(path, images, "image", key) for key in ("width", "height")], axis=1)
    bad = np.flatnonzero((sizes < 1).any(axis=1))
    if bad.size:
        width, height = sizes[bad[0]]
        raise InputError(
            f"image {images[bad[0]]['id']} of {path} is {width} x {height} pixels"
            f"{_others(bad.size, 'image')}; correct its width and height"
        )
    return sizes


def _strings(path: Path, records: Sequence[dict], kind: str, key: str) -> list[str]:
    values = _values(path, records, kind, key)
    for record, value in zip(records, values, strict=True):
        if not isinstance(value, str) or not value:
            raise InputError(f'"{key}" of {kind} {record["id"]} in {path} is {value!r}; give it a name')
    return values


def _crowd(path: Path, annotations: Sequence[dict]) -> np.ndarray:
    """Returns which annotations are crowd regions: [A] bool."""
    flags = [record.get("iscrowd", 0) for record in annotations]
    wrong = next((place for place, flag in enumerate(flags) if flag not in (0, 1)), None)
    if wrong is not None:
        raise InputError(
            f'"iscrowd" of annotation {annotations[wrong]["id"]} in {path} is {flags[wrong]!r}, not 0 or 1; '
            "correct it or remove it, which means 0"
        )
    return np.array(flags, dtype=bool)


def _lookup(
    path: Path, annotations: Sequence[dict], annotation_ids: np.ndarray, key: str, known: np.ndarray
) -> np.ndarray:
    """Returns the place of each annotation's `key` among the ascending ids `known`: [A] int64."""
    wanted = _integers(path, annotations, "annotation", key)
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    unknown = np.flatnonzero(known[places] != wanted)
    if unknown.size:
        noun = key.removesuffix("_id")
        plural = {"image": "images", "category": "categories"}[noun]
        raise InputError(
            f"annotation {annotation_ids[unknown[0]]} of {path} refers to {noun} {wanted[unknown[0]]}, which is "
            f"not among its {len(known)} {plural}{_others(unknown.size, 'such annotation')}; "
            f"add the {noun} or remove the annotation"
        )
    return places


def _clip(
    path: Path,
    boxes: np.ndarray,
    sizes: np.ndarray,
    annotation_ids: np.ndarray,
    image_ids: np.ndarray,
    kept: np.ndarray,
) -> np.ndarray:
    """Cut boxes [A, 4] xyxy to their images' sizes [A, 2]; refuse those without area or clearly outside."""

    def refuse(bad: np.ndarray, what: str) -> None:
        if not bad.any():
            return
        place = np.flatnonzero(bad)[0]
        x, y, right, bottom = boxes[place]
        width, height = sizes[place]
        more = _others(int(bad.sum()), "such box", "such boxes")
        raise InputError(
            f"annotation {annotation_ids[place]} of {path} {what}: bbox [{x:g}, {y:g}, {right - x:g}, {bottom - y:g}] "
            f"in image {image_ids[place]} of {width} x {height} px{more}; "
            "correct it, remove it, or set its iscrowd to 1 to have the region ignored"
        )

    limit = np.concatenate([sizes, sizes], axis=1)  # [A, 4]
    inside = np.clip(boxes, 0, limit)
    stored = boxes.astype(np.float32)  # what trains; a sliver may lose its width in it
    refuse(kept & (stored[:, 2:] <= stored[:, :2]).any(axis=1), "has a box of zero or negative area")
    overhang = np.abs(boxes - inside).max(axis=1, initial=0)
    lost = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    refuse(kept & (lost | (overhang > OVERHANG)), "has a box outside its image")
    return inside


def _others(count: int, noun: str, plural: str | None = None) -> str:
    if count < 2:
        return ""
    return f", and {count - 1} more {noun if count == 2 else plural or noun + 's'}"
