"""See :func:`write_digit_scenes`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jdkd.data.photographs import photographs
from jdkd.data.splits import ANNOTATIONS
from jdkd.errors import InputError
from jdkd.files import claim_folder, unwritable

CLASSES = tuple(str(digit) for digit in range(10))
ONE_CLASS = ("digit",)
TRAIN_DIGITS = 1400  # of scikit-learn's 1,797; the others appear in val scenes only
FEWEST, MOST = 2, 7  # digits per scene
SMALLEST, LARGEST = 0.15, 0.5  # height of a digit over the image's side
MOST_HIDDEN = 0.25  # of the smaller of two boxes, by a later digit
INK = 0.3  # darkness from which a pixel belongs to the digit


@dataclass(frozen=True)
class Request:
    """What a folder of digit scenes was asked to be; two equal requests give equal folders."""

    train: int
    val: int
    size: int
    seed: int
    one_class: bool = False

    def told(self) -> dict[str, Any]:
        """As the annotation files have it: those of ten classes do not mention `one_class`, and never did."""
        return {name: value for name, value in asdict(self).items() if name != "one_class" or value}


def write_digit_scenes(
    out: Path | str,
    *,
    train: int = 400,
    val: int = 100,
    size: int = 128,
    seed: int = 0,
    one_class: bool = False,
    resume: bool = False,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> None:
    """Writes scenes of real handwritten digits over real photographs as a COCO-format folder.

    The digits are scikit-learn's 1,797 (Alpaydin and Kaynak 1998), pasted at several scales, colours and
    contrasts, with some overlap and clutter, over crops of its two sample photographs. Boxes are tight around
    the ink; segmentations are what of it no later digit hides. Scene k of a split depends on (seed, split, size, k)
    alone, and no digit of a training scene is in a validation scene. The annotation files say that digits are not
    mirror-symmetric.

    Args:
        out: the folder to make. It appears whole or not at all.
        train, val: scenes per split.
        size: side of the square images, in pixels.
        seed: decides everything that is drawn.
        one_class: call every digit "digit", in the same pictures: an easier task, learned in fewer steps.
        resume: accept a folder that holds exactly these scenes already, and leave it alone.
        progress: called with (scenes done, scenes in all, {}).

    Raises:
        InputError: a number is out of range, ``out`` holds something else, or the disk is full.
    """
    given, request = Path(out), Request(train, val, size, seed, one_class)
    _check(request)
    if _holds_something(given):
        _require_same(given.resolve(), request, resume)
        return
    if os.path.abspath(given) == os.getcwd():
        raise InputError(f"{given} is the folder you are in, which cannot be put in place whole; name a new folder")
    made = claim_folder(given, "the folder of the scenes")
    out = given.resolve()
    report = progress or (lambda done, total, facts: None)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        for split, before in (("train", 0), ("val", train)):

            def told(done: int, before: int = before) -> None:
                report(before + done, train + val, {})

            _write_split(partial, split, request, told)
        os.replace(partial, out)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds the scenes by now, or was ours alone
                out.rmdir()


def _write_split(folder: Path, split: str, request: Request, scene_done: Callable[[int], None]) -> None:
    """Writes the images and annotations of one split below ``folder``."""
    pictures = folder / f"{split}2017"
    pictures.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for k in range(request.train if split == "train" else request.val):
        rng = np.random.default_rng([request.seed, split == "val", request.size, k])
        picture, found, owners = scene(request.size, rng, split)
        name = f"{k:06d}.png"
        Image.fromarray(picture).save(pictures / name, compress_level=1)
        images.append({"id": k, "file_name": name, "width": request.size, "height": request.size})
        first = len(annotations)
        for i, (box, digit) in enumerate(found, 1):
            annotations.append(_annotation(first + i, k, box, 0 if request.one_class else digit, owners == i))
        scene_done(k + 1)
    _write_annotations(folder / ANNOTATIONS.format(split=split), request, images, annotations)


def scene(
    size: int, rng: np.random.Generator, split: str
) -> tuple[np.ndarray, list[tuple[tuple[int, int, int, int], int]], np.ndarray]:
    """One scene.

    Args:
        size: side in pixels.
        rng: the source of chance.
        split: ``"train"`` or ``"val"``, which decides the digits to draw from.

    Returns:
        The picture, uint8 ``[size, size, 3]``; the box (x, y, width, height in pixels) and the class of every digit;
        and ``[size, size]``, which of them, from 1, each pixel shows, 0 for none.
    """
    images, labels = _digits(split)
    picture, owners = _background(size, rng), np.zeros((size, size), dtype=np.uint8)
    for _ in range(rng.integers(0, 3)):  # clutter: strokes that are no digit
        _stroke(picture, rng)
    found: list[tuple[tuple[int, int, int, int], int]] = []
    for _ in range(rng.integers(FEWEST, MOST + 1)):
        which = rng.integers(len(images))
        height = round(size * np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        ink = _ink(images[which], max(6, height), rng)
        box = _place(ink.shape, [box for box, _ in found], size, rng)
        if box is not None:
            _paint(picture, ink, box, rng)
            found.append((box, int(labels[which])))
            x, y, width, height = box
            owners[y : y + height, x : x + width][ink > 0] = len(found)
    return picture.round().clip(0, 255).astype(np.uint8), found, owners


@cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 8, 8] in 0..1 and labels [n] of one split's digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    chosen = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    return digits.images[chosen] / 16.0, digits.target[chosen]


@cache
def _pictures() -> list[Image.Image]:
    return [Image.fromarray(photograph.permute(1, 2, 0).numpy()) for photograph in photographs()]


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square crop of a photograph, darkened so that digits stand out, float [size, size, 3] in 0..255."""
    photograph = _pictures()[rng.integers(len(_pictures()))]
    width, height = photograph.size
    side = int(rng.integers(96, min(height, width) + 1))
    x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop, dtype=np.float64) * rng.uniform(0.4, 0.75)


def _ink(digit: np.ndarray, height: int, rng: np.random.Generator) -> np.ndarray:
    """A digit [8, 8] enlarged and turned a little: ink in 0..1, cropped tight to where it shows."""
    image = Image.fromarray((digit * 255).astype(np.uint8))
    width = max(4, round(height * rng.uniform(0.75, 1.1)))
    image = image.resize((round(width * 8 / 6), round(height * 8 / 7.5)), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    ink = np.asarray(image, dtype=np.float64) / 255
    rows, columns = np.flatnonzero((ink > INK).any(1)), np.flatnonzero((ink > INK).any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.where(ink > INK, np.clip(ink * 1.4, 0, 1), 0)


def _place(
    shape: tuple[int, int], boxes: list[tuple[int, int, int, int]], size: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Where a digit of that height and width hides no other too much; None if nowhere is found."""
    height, width = shape
    if max(height, width) > size:
        return None
    for _ in range(30):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        if all(_hidden((x, y, width, height), box) <= MOST_HIDDEN for box in boxes):
            return x, y, width, height
    return None


def _hidden(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Overlap of two boxes over the smaller one's area."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, across) * max(0, down) / min(a[2] * a[3], b[2] * b[3])


def _paint(picture: np.ndarray, ink: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """Blends a digit into the picture, in a bright colour."""
    x, y, width, height = box
    behind = picture[y : y + height, x : x + width]
    opacity = (ink * rng.uniform(0.8, 1.0))[..., None]
    behind[:] = behind * (1 - opacity) + rng.uniform(150, 255, 3) * opacity


def _stroke(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a straight bar of a random colour."""
    size = len(picture)
    (x0, y0), angle = rng.uniform(0, size, 2), rng.uniform(0, np.pi)
    length, thickness = size * rng.uniform(0.1, 0.35), max(1.0, size * rng.uniform(0.008, 0.025))
    rows, columns = np.mgrid[:size, :size]
    along = (columns - x0) * np.cos(angle) + (rows - y0) * np.sin(angle)
    across = (rows - y0) * np.cos(angle) - (columns - x0) * np.sin(angle)
    picture[(np.abs(along) < length / 2) & (np.abs(across) < thickness)] = rng.uniform(60, 220, 3)


def _annotation(
    number: int, image: int, box: tuple[int, int, int, int], label: int, shown: np.ndarray
) -> dict[str, Any]:
    from pycocotools import mask

    lengths = mask.encode(np.asfortranarray(shown, dtype=np.uint8))
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": {"size": lengths["size"], "counts": lengths["counts"].decode()},
    }


def _write_annotations(
    file: Path, request: Request, images: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    info = {"description": "digit scenes", "mirror_symmetric": False, "request": request.told()}
    classes = ONE_CLASS if request.one_class else CLASSES
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))


def _check(request: Request) -> None:
    least = {"train": 1, "val": 1, "size": 32, "seed": 0}
    for name, lowest in least.items():
        if (value := getattr(request, name)) < lowest:
            raise InputError(f"{name} is {value} but must be at least {lowest}; give a larger one")


def _holds_something(out: Path) -> bool:
    try:
        return out.is_file() or (out.is_dir() and any(out.iterdir()))
    except (OSError, ValueError):  # a name that no file can have, which is refused where it is made
        return False


def _require_same(out: Path, request: Request, resume: bool) -> None:
    """Accepts a folder only where it holds the very scenes asked for and may be kept."""
    if out.is_file():
        raise InputError(f"{out} is a file and cannot hold digit scenes; give a new or an empty folder")
    try:
        contents = [json.loads((out / ANNOTATIONS.format(split=split)).read_text()) for split in ("train", "val")]
        held = [content["info"]["request"] for content in contents]
        found = asdict(Request(**held[0]))
    except (OSError, ValueError, KeyError, TypeError):
        inside = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise InputError(
            f"{out} holds {inside}, which is no finished folder of digit scenes; give a new or an empty folder"
        ) from None
    asked = asdict(request)
    if differing := [f"{name} was {found[name]} and is {asked[name]}" for name in asked if found[name] != asked[name]]:
        raise InputError(f"{out} holds other digit scenes ({', '.join(differing)}); give another folder")
    if not resume:
        raise InputError(f"{out} already holds these digit scenes; give another folder, or --resume to keep them")
