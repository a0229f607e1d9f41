"""See :func:`read_image`."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from jdkd.errors import InputError

_ORIENTATION = 0x0112
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: Path, width: int, height: int) -> torch.Tensor:
    """Decode an image file of any common kind to RGB, oriented as its annotations mean it.

    Grey-scale, palette and CMYK become RGB; alpha is dropped (as COCO readers do: the colour under it is kept);
    16-bit samples keep their upper 8 bits. A picture with an EXIF orientation is turned to how it is displayed,
    which is how annotators see it, if it then has the annotated size; if only the picture as stored has that
    size, its boxes were drawn on the stored pixels (parts of COCO are like that), and it stays unturned.

    Args:
        path: the image file.
        width: the annotation file's width in pixels.
        height: the annotation file's height in pixels.

    Returns:
        image: [3, height, width] uint8.

    Raises:
        InputError: the file is missing, truncated or no image, or has another size than annotated.
    """
    try:
        with Image.open(path) as file:
            file.load()
            stored = file.size
            turned = file.getexif().get(_ORIENTATION, 1) != 1
            image = _rgb(ImageOps.exif_transpose(file) if turned else file)
            if turned and image.size != (width, height) == stored:
                image = _rgb(file)
    except FileNotFoundError as error:
        raise InputError(f"image {path} is missing; put it back or remove it from the annotations") from error
    except _BROKEN as error:
        raise InputError(
            f"image {path} cannot be read ({error or type(error).__name__}): it is truncated or not an image; "
            "replace it or remove it from the annotations"
        ) from error
    if image.size != (width, height):
        raise InputError(
            f"image {path} is {image.size[0]} x {image.size[1]} pixels but its annotations say {width} x {height}; "
            "correct the width and height (and boxes) in the annotation file or replace the image"
        )
    return F.pil_to_tensor(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point samples have no agreed range")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of palettes with transparency; alpha is dropped on purpose
        return image.convert("RGB")
