"""See :func:`read_image`."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from jdkd.errors import InputError

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on damaged files."""
_SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats whose mode I, which has 32 bits in Pillow, holds 16."""
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

Size = tuple[int, int]


class ImageFault(Exception):
    """What is wrong with one image file.

    Attributes:
        kind: as of :class:`jdkd.data.problems.Problem`.
        what: reads on after the file's name.
    """

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind, self.what = kind, what


MISSING, UNREADABLE = "missing images", "images that cannot be read"
TOO_LARGE, TOO_DEEP = "images with too many pixels", "images of 32 bits a sample"
WRONG_SIZE = "images of another size than annotated"
REMEDIES = {
    MISSING: "put it there",
    UNREADABLE: "put a sound copy of it in its place, and find all such images with `jdkd data check`",
    TOO_DEEP: "save it with 8 or 16 bits a sample, scaled to their range",
    TOO_LARGE: "cut it into tiles or shrink it, and its boxes with it",
    WRONG_SIZE: "put the image that was annotated in its place, or correct width, height and boxes in the annotations",
}


def read_image(path: Path | str, size: Size | None = None) -> torch.Tensor:
    """Decode an image file of any common kind to RGB, as all of jdkd does.

    Grey-scale, palette and CMYK become RGB; alpha is dropped (as COCO readers do: the colour under it is kept);
    samples of 12 or 16 bits keep their upper 8. Samples of 32 bits have no agreed range and are refused. Of several
    frames or pages, the first is read.

    A picture with an EXIF orientation is turned to how it is displayed, which is how annotators see it, unless
    only the picture as stored has the annotated size: then its boxes were drawn on the stored pixels (parts of
    COCO are like that), and it stays unturned.

    Args:
        path: the image file.
        size: annotated width and height in pixels, if there are annotations.

    Returns:
        image: [3, height, width] uint8.

    Raises:
        InputError: the file is missing, truncated, no image or too large, or has another size than annotated.
    """
    try:
        with no_warnings(), _opened(Path(path)) as file:
            image = _of_jpeg(Path(path), file, size)
            return F.pil_to_tensor(_decoded(file, size)) if image is None else image
    except ImageFault as fault:
        raise InputError(f"image {path} {fault.what}; {REMEDIES[fault.kind]}") from fault


def verify_image(path: Path, size: Size, *, decode: bool) -> None:
    """Find out whether :func:`read_image` will read an image file.

    Args:
        path: the image file.
        size: annotated width and height in pixels.
        decode: decode it. Otherwise its header is read and the end looked at, and only what looks truncated is
            decoded.

    Raises:
        ImageFault: it will not.
    """
    with _opened(path) as file:
        if decode or not _looks_whole(path, file):
            _decoded(file, size)
        else:
            _require_depth(file)
            if size != file.size:
                _orientation_for(file, size)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Pillow's warnings say nothing that helps: odd metadata, alpha that is dropped, sizes below its limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image file with its header read; damage found inside the block becomes an :class:`ImageFault` too."""
    try:
        if not path.is_file():
            if not os.path.lexists(path):
                raise ImageFault(MISSING, "is missing")
            what = "is a folder" if path.is_dir() else "is a link to nothing" if path.is_symlink() else "is no file"
            raise ImageFault(UNREADABLE, f"cannot be read: it {what}")
        with Image.open(path) as file:
            yield file
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageFault(TOO_LARGE, f"has more than the {limit:,} pixels that Pillow decodes") from error
    except Image.UnidentifiedImageError as error:
        what = "is empty" if path.stat().st_size == 0 else "is not an image of a kind that Pillow knows"
        raise ImageFault(UNREADABLE, f"cannot be read: it {what}") from error
    except _BROKEN as error:
        if reason := getattr(error, "strerror", None):  # the system's word, not Pillow's
            raise ImageFault(UNREADABLE, f"cannot be read ({reason})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageFault(UNREADABLE, f"cannot be read ({reason}): it is truncated or damaged") from error


def _of_jpeg(path: Path, file: Image.Image, size: Size | None) -> torch.Tensor | None:
    """A common JPEG decoded by torchvision, [3, H, W], to the same pixels in a fraction of Pillow's time.

    None for what has to be turned or converted, and for what torchvision does not decode: Pillow says what is wrong.
    """
    if file.format != "JPEG" or file.mode not in ("RGB", "L") or _orientation_for(file, size) != 1:
        return None
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    try:
        return decode_jpeg(content, mode=ImageReadMode.RGB)
    except RuntimeError:
        return None


def _decoded(file: Image.Image, size: Size | None) -> Image.Image:
    """The picture in RGB, turned as it should be."""
    _require_depth(file)
    file.load()
    orientation = _orientation_for(file, size)
    image = _rgb(file, _bits(file))
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation_for(file: Image.Image, size: Size | None) -> int:
    """The EXIF orientation to undo, such that the picture has the annotated size.

    Raises:
        ImageFault: it has that size neither as stored nor as displayed.
    """
    orientation = _orientation(file)
    shown = file.size[::-1] if orientation in (5, 6, 7, 8) else file.size
    if size in (None, shown):
        return orientation
    if size == file.size:
        return 1
    raise ImageFault(WRONG_SIZE, f"is {shown[0]} x {shown[1]} pixels but its annotations say {size[0]} x {size[1]}")


def _orientation(file: Image.Image) -> int:
    """The EXIF orientation; 1, as stored, where there is none or the EXIF data are damaged."""
    try:
        value: Any = file.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _require_depth(file: Image.Image) -> None:
    if file.mode == "F" or (file.mode == "I" and file.format not in _SCALED_TO_16_BITS):
        raise ImageFault(TOO_DEEP, f"has samples of 32 bits or with a sign (mode {file.mode}), which have no range")


def _rgb(image: Image.Image, bits: int) -> Image.Image:
    if image.mode.startswith("I"):  # deep grey, which Pillow would clip to white instead of scaling
        samples = np.asarray(image).astype(np.int64).clip(0, 2**bits - 1)  # [H, W]
        image = Image.fromarray((samples >> (bits - 8)).astype(np.uint8))
    return image.convert("RGB")


def _bits(file: Image.Image) -> int:
    """How many bits the samples of deep grey have: 16 but for TIFF's 12, which Pillow leaves unscaled."""
    if file.mode.startswith("I") and file.format == "TIFF":
        return int(cast(TiffImagePlugin.TiffImageFile, file).tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
    return 16


def _looks_whole(path: Path, file: Image.Image) -> bool:
    """Whether the end of the file is where its format says; False where that is not known."""
    length = path.stat().st_size
    with open(path, "rb") as raw:
        head = raw.read(12)
        raw.seek(max(0, length - 12))
        tail = raw.read(12)
    if file.format in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if file.format == "PNG":
        return tail == _PNG_END
    if file.format == "GIF":
        return tail.endswith(b";")
    if file.format in ("BMP", "WEBP"):  # the length stands in the header; RIFF's leaves out 8 bytes
        place, more = (2, 0) if file.format == "BMP" else (4, 8)
        return 0 < int.from_bytes(head[place : place + 4], "little") + more <= length
    if file.format == "TIFF":
        return _strips_end(cast(TiffImagePlugin.TiffImageFile, file).tag_v2) <= length
    return False


def _strips_end(tags: Any) -> float:
    """Where the last strip or tile of a TIFF page ends, in bytes from the beginning of the file."""
    for offsets, counts in (
        (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS),
        (TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.TILEBYTECOUNTS),
    ):
        if offsets in tags and counts in tags:
            return max(map(sum, zip(tags[offsets], tags[counts], strict=False)))
    return float("inf")
