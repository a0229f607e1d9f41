"""Images from files, and detections drawn on them, by Pillow alone."""

from __future__ import annotations

import colorsys
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jdkd.errors import InputError, said
from jdkd.export.preparing import Found

DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # of 16 bits, or of 12 in TIFF, of which the upper 8 are kept
BITS_PER_SAMPLE = 258  # tag of TIFF
MARK = b"drawn by jdkd predict"  # the comment of every picture that is drawn here
HEAD = 1024  # bytes of a JPEG that hold it, right behind the first marker


def read_picture(file: Path) -> np.ndarray:
    """An image file as displayed, in RGB, ``[H, W, 3]`` uint8.

    Raises:
        InputError: it is no image that Pillow can read, or of 32 bits a sample.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as opened:
                picture = ImageOps.exif_transpose(opened)
                if picture.mode in DEEP or (picture.mode == "I" and opened.format in ("PNG", "PPM")):
                    samples = np.asarray(picture).astype(np.int64) >> (_bits(opened) - 8)
                    picture = Image.fromarray(samples.astype(np.uint8))
                elif picture.mode in ("I", "F"):
                    raise InputError(f"image {file} has 32 bits a sample; save it with 8 or 16.")
                return np.array(picture if picture.mode == "RGB" else _flat(picture))
    except InputError:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise InputError(
            f"image {file} cannot be read ({' '.join(said(error).split())[:120]}); give another."
        ) from None


def _bits(picture: Image.Image) -> int:
    """How many bits the samples of deep grey have: 16 but for TIFF's 12, which Pillow leaves unscaled."""
    tags = getattr(picture, "tag_v2", {})  # TIFF's
    return int(tags.get(BITS_PER_SAMPLE, (16,))[0])


def _flat(picture: Image.Image) -> Image.Image:
    """In RGB; alpha is dropped."""
    return (picture.convert("RGBA") if "transparency" in picture.info else picture).convert("RGB")


def drawn(image: np.ndarray, found: Found, classes: Sequence[str]) -> bytes:
    """A JPEG of an image ``[H, W, 3]`` uint8 with detections on it, a colour a class."""
    pixels = image.astype(np.float32)
    for mask, label in zip(found.get("masks", ()), found["labels"].tolist(), strict=False):
        inside = mask > 0.5
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(_colour(label), dtype=np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen, longest = ImageDraw.Draw(picture), max(picture.size)
    width, font = max(1, round(longest / 300)), ImageFont.load_default(max(9, longest / 50))
    order = np.argsort(found["scores"], kind="stable")  # the surest on top
    for box, label, score in ((found[name][place] for name in ("boxes", "labels", "scores")) for place in order):
        left, top, right, bottom = box.tolist()
        colour, words = _colour(int(label)), f"{name_of(int(label), classes)} {score:.2f}"
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        over = pen.textbbox((left, top), words, font=font)
        place = left, max(0.0, top - (over[3] - top) - width)
        pen.rectangle(pen.textbbox(place, words, font=font), fill=colour)
        pen.text(place, words, fill=(0, 0, 0), font=font)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92, comment=MARK)
    return stream.getvalue()


def is_drawn(file: Path) -> bool:
    """Whether a file is a picture that :func:`drawn` made, as it says itself; one that is not there is none."""
    try:
        with file.open("rb") as stream:
            return MARK in stream.read(HEAD)
    except OSError:  # a folder, or nothing that could be looked into
        return False


def name_of(label: int, classes: Sequence[str]) -> str:
    """What a label stands for; its number where that is not known."""
    return classes[label - 1] if 0 < label <= len(classes) else str(label)


def _colour(label: int) -> tuple[int, int, int]:
    """Bright, and far from that of the next label."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1))
    return red, green, blue
