"""See :func:`inspect_annotations`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jdkd.data.boxes import clean, corners_of
from jdkd.data.columns import Columns
from jdkd.data.index import Contents, Index, Texts, index_of, text_as_arrays
from jdkd.data.problems import Problem, recalled, remembered
from jdkd.data.records import PLURALS, Records
from jdkd.data.stream import Unusual, read_object
from jdkd.errors import InputError

LISTS = {
    "images": ("id", "width", "height", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}  # and what of their records is read


@dataclass(frozen=True)
class GroundTruth:
    """What detections are scored against, crowd regions included, in the order of the file."""

    ids: np.ndarray  # [G] int64
    rows: np.ndarray  # [G] which of the images
    labels: np.ndarray  # [G] int64 in 1..K
    boxes: np.ndarray  # [G, 4] float64 x, y, width, height in pixels, inside the image
    areas: np.ndarray  # [G] float64 px^2
    crowd: np.ndarray  # [G] bool


@dataclass(frozen=True)
class Annotations:
    """A cleaned COCO annotation file as flat arrays, images in order of their id.

    Boxes ``offsets[i]:offsets[i + 1]`` belong to image ``i``. Crowd regions are in ``truth`` only.
    """

    info: dict[str, Any]
    image_ids: np.ndarray  # [N] int64, ascending
    file_names: list[str]  # [N], relative to the images folder
    sizes: np.ndarray  # [N, 2] int64, width and height
    classes: tuple[str, ...]  # [K] names in order of category id
    categories: np.ndarray  # [K] int64, ascending
    boxes: np.ndarray  # [A, 4] float32 xyxy in pixels, inside the image
    labels: np.ndarray  # [A] int64 in 1..K
    offsets: np.ndarray  # [N + 1] int64
    truth: GroundTruth
    index: Index | None = None  # where they are kept, if they are

    def __reduce__(self) -> Any:
        """What is kept on disk is opened again in another process, not sent to it."""
        kept = self.index is not None and self.index.read() is not None
        return (_reopened, (self.index,)) if kept else (Annotations, tuple(vars(self).values()))


def open_annotations(path: Path) -> tuple[Annotations | None, list[Problem]]:
    """The same as :func:`inspect_annotations`, of a large file out of the index that the first to open it leaves.

    Of what is put right on reading, the index keeps the numbers and the first examples. A file with errors has none.
    """
    index = index_of(path, "annotations")
    if index is None:
        return inspect_annotations(path)
    kept = index.read()
    if kept is None:
        found, problems = inspect_annotations(path)
        if found is None or any(problem.severity == "error" for problem in problems):
            return found, problems
        kept = index.write(*_to_keep(found, problems))
        if kept is None:
            return found, problems
    return _from_index(index, kept), [recalled(path, problem) for problem in kept.facts["problems"]]


def inspect_annotations(path: Path) -> tuple[Annotations | None, list[Problem]]:
    """Read a COCO annotation file and find everything that is wrong with it.

    Boxes without area, or of which nothing lies inside the image, are left out, boxes over its edge are cut, and
    areas that cannot be are replaced: these are repairs. Everything else is an error. Segmentations are dropped:
    they are most of the memory and box detection never looks at them.

    Args:
        path: a COCO "instances" JSON file.

    Returns:
        annotations: the sound part of the file, all of it where there is no error; None without a sound image.
        problems: errors first.
    """
    problems: list[Problem] = []
    raw = _load(path, problems)
    images, annotations, categories = (
        Records(kind, path, raw[key] if key in raw else Columns.of([], keys), problems)
        for kind, (key, keys) in zip(("image", "annotation", "category"), LISTS.items(), strict=True)
    )
    sizes, file_names, names = _sizes(images), _file_names(images), categories.strings("name")
    _warn_of_repeated(categories, "categories of one name", names, "each is a class of its own")
    image_order, category_order = _sound_by_id(images), _sound_by_id(categories)
    image_ids, category_ids = images.ids[image_order], categories.ids[category_order]
    rows = _lookup(annotations, "image_id", images, image_ids)
    labels = _lookup(annotations, "category_id", categories, category_ids) + 1
    boxes = annotations.numbers("bbox", 4).astype(np.float64)  # [A, 4] x, y, width, height
    crowd = _crowd(annotations)
    if not len(image_ids):
        _require_content(path, images, annotations, categories, crowd, crowd, problems)
        return None, _errors_first(problems)

    sizes, file_names = sizes[image_order], [file_names[place] for place in image_order]
    corners, kept, areas = clean(annotations, boxes, sizes[rows], crowd, lambda place: file_names[rows[place]])
    _require_content(path, images, annotations, categories, crowd, kept, problems)
    cut = kept & (corners != corners_of(boxes)).any(axis=1)
    sides = corners[:, 2:] - corners[:, :2]
    inside = np.where(cut[:, None], np.concatenate([corners[:, :2], sides], axis=1), boxes)  # [A, 4]
    true = kept | (crowd & annotations.sound)
    by_image = np.argsort(rows, kind="stable")
    by_image = by_image[kept[by_image]]
    found = Annotations(
        info=raw["info"] if isinstance(raw.get("info"), dict) else {},
        image_ids=image_ids,
        file_names=file_names,
        sizes=sizes,
        classes=tuple(names[place] for place in category_order),
        categories=category_ids,
        boxes=corners[by_image].astype(np.float32),
        labels=labels[by_image],
        offsets=np.searchsorted(rows[by_image], np.arange(len(image_ids) + 1)),
        truth=GroundTruth(annotations.ids[true], rows[true], labels[true], inside[true], areas[true], crowd[true]),
    )
    return found, _errors_first(problems)


def _to_keep(found: Annotations, problems: list[Problem]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the rest of what an index keeps."""
    names, ends = text_as_arrays([name.encode() for name in found.file_names])
    arrays = {"file_names": names, "name_ends": ends}
    arrays |= {name: array for name, array in vars(found).items() if isinstance(array, np.ndarray)}
    arrays |= {f"truth.{name}": array for name, array in vars(found.truth).items()}
    return arrays, {
        "info": found.info,
        "classes": found.classes,
        "problems": [remembered(problem) for problem in problems],
    }


def _from_index(index: Index, kept: Contents) -> Annotations:
    arrays = dict(kept.arrays)
    texts = Texts(arrays.pop("file_names"), arrays.pop("name_ends"))
    truth = {name.removeprefix("truth."): arrays.pop(name) for name in kept.arrays if name.startswith("truth.")}
    return Annotations(
        info=kept.facts["info"],
        file_names=[text.decode() for text in texts],
        classes=tuple(kept.facts["classes"]),
        truth=GroundTruth(**truth),
        index=index,
        **arrays,
    )


def _reopened(index: Index) -> Annotations:
    if (kept := index.read()) is None:
        raise InputError(f"the index {index.file} of {index.source} is gone; open the data anew")
    return _from_index(index, kept)


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


def _load(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """The object in the file, its three lists as columns; what is no list is left out and a problem."""

    def wrong(kind: str, what: str, remedy: str) -> None:
        problems.append(Problem(kind, path, [0], lambda _: what, remedy))

    another = "give a COCO annotation file"
    try:
        with _no_gc():
            raw = _read(path)
    except (ValueError, RecursionError) as error:
        wrong("no JSON", f"is not JSON ({error})", another)
        return {}
    except OSError as error:
        wrong("not readable", f"cannot be read ({error.strerror})", another)
        return {}
    if not isinstance(raw, dict):
        wrong("no COCO annotations", f"holds a {type(raw).__name__}, not an object", another)
        return {}
    for key in LISTS:
        if not isinstance(raw.get(key), Columns):
            found = "has no" if key not in raw else f"has {type(raw[key]).__name__} instead of a list as"
            remedy = "a COCO annotation file lists images, annotations, categories"
            wrong(f"no {key}", f'{found} "{key}"', remedy)
            raw.pop(key, None)
    return raw


def _read(path: Path) -> Any:
    """What is in the file, its three lists as columns; read in little memory, unless it is unusual."""
    raw: dict[str, Any] = {}
    try:
        for name, value in read_object(path, tuple(LISTS)):
            if name not in LISTS:
                raw[name] = value if name == "info" else None
            elif name not in raw:
                raw[name] = value if value != [] else Columns(LISTS[name])
            else:
                raw[name].add(value)
    except Unusual:
        with open(path, encoding="utf-8-sig") as file:
            raw = json.load(file)
        if isinstance(raw, dict):
            raw |= {key: Columns.of(raw[key], keys) for key, keys in LISTS.items() if isinstance(raw.get(key), list)}
        return raw
    for name in LISTS:
        if isinstance(raw.get(name), Columns):
            raw[name].close()
    return raw


def _sound_by_id(records: Records) -> np.ndarray:
    """Places of the sound records in order of id."""
    places = np.flatnonzero(records.sound)
    return places[np.argsort(records.ids[places])]


def _sizes(images: Records) -> np.ndarray:
    """Width and height of all images: [N, 2] int64."""
    sizes = np.stack([images.integers(key) for key in ("width", "height")], axis=1)
    bad = (sizes < 1).any(axis=1)
    bad[images.unread.get("width", []) + images.unread.get("height", [])] = False
    images.fault(
        "images without pixels",
        bad,
        lambda place: f"is {sizes[place, 0]} x {sizes[place, 1]} pixels",
        "correct its width and height",
    )
    return sizes


def _file_names(images: Records) -> list[str]:
    """The file names, which stay inside the images folder: [N]."""
    names = images.strings("file_name")
    faults = {
        "names that no file can have": (_impossible, "holds a NUL or half a surrogate pair", "rename the file"),
        "names outside the images folder": (
            _escapes,
            "is an absolute path or leads out of the images folder",
            "give it relative to the images folder",
        ),
    }
    for kind, (is_bad, what, remedy) in faults.items():
        bad = [place for place, name in enumerate(names) if is_bad(name)]
        images.fault(kind, bad, lambda place, what=what: f'has "file_name" {names[place]!r}, which {what}', remedy)
    normal = [name.replace("\\", "/") for name in names]
    _warn_of_repeated(images, "files listed more than once", normal, "used as often, each time with its own boxes only")
    return names


def _warn_of_repeated(records: Records, kind: str, names: list[str], done: str) -> None:
    """Warns of records that are called as one before them is."""
    if len(set(names)) == len(names):
        return
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    again = records.sound & np.array([first[name] != place for place, name in enumerate(names)], dtype=bool)
    records.repair(
        kind, again, lambda place: f"has {names[place]}, as {records.name(first[names[place]])} has", done, "warning"
    )


def _impossible(name: str) -> bool:
    return (not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name)) or "\0" in name


def _escapes(name: str) -> bool:
    normal = name.replace("\\", "/")
    if normal.startswith("/") or normal[1:3] == ":/":
        return True
    depth = 0
    for part in PurePosixPath(normal).parts if ".." in normal else ():
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _crowd(annotations: Records) -> np.ndarray:
    """Which annotations are crowd regions: [A] bool."""
    flags = annotations.column("iscrowd")
    absent = set(flags.absent)
    bad = [place for place, flag in enumerate(flags) if flag not in (0, 1) and place not in absent]
    annotations.fault(
        'annotations with a wrong "iscrowd"',
        bad,
        lambda place: f'has "iscrowd" {flags[place]!r}, not 0 or 1',
        "correct it or remove it, which means 0",
    )
    return np.array([flag == 1 for flag in flags], dtype=bool)


def _lookup(annotations: Records, key: str, others: Records, usable: np.ndarray) -> np.ndarray:
    """The place of each annotation's ``key`` among the ascending ids ``usable``: [A] int64, 0 where there is none.

    What refers to a record that is not in the file is a fault; what refers to a faulty one is only left out.
    """
    wanted = annotations.integers(key)
    places = np.searchsorted(usable, wanted).clip(max=max(0, len(usable) - 1))
    lost = usable[places] != wanted if len(usable) else np.ones(len(wanted), dtype=bool)
    unknown = lost.copy()
    unknown[annotations.unread.get(key, [])] = False
    unknown[unknown] = ~np.isin(wanted[unknown], others.ids)
    plural = PLURALS[others.kind]

    def describe(place: int) -> str:
        return f"refers to {others.kind} {wanted[place]}, which is not among the {len(others)} {plural}"

    annotations.fault(f"an unknown {others.kind}", unknown, describe, f"add the {others.kind} or remove the annotation")
    annotations.sound &= ~lost
    return np.where(lost, 0, places)


def _require_content(
    path: Path,
    images: Records,
    annotations: Records,
    categories: Records,
    crowd: np.ndarray,
    kept: np.ndarray,
    problems: list[Problem],
) -> None:
    """Find that there is nothing to detect, where that is not a consequence of other errors."""
    if any(problem.severity == "error" for problem in problems):
        return
    if not len(images):
        what, remedy = "is an empty split: it lists 0 images", "give a file that lists at least one"
    elif not len(categories):
        what, remedy = "lists 0 categories", "give a file that names the classes to detect"
    elif not kept.any():
        left_out = int((~kept & ~crowd).sum())
        what = (
            f"is an empty split: its {len(images)} images hold no box to detect ({len(annotations)} annotations, "
            f"of them {int(crowd.sum())} crowd regions and {left_out} boxes without area or outside their image)"
        )
        remedy = "give an annotated file"
    else:
        return
    problems.append(Problem("nothing to detect", path, [0], lambda _: what, remedy))


def _errors_first(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: problem.severity != "error")
