"""Images as they are read and drawn on without torch."""

import io

import numpy as np
import pytest
from PIL import Image

from jdkd.data import read_image
from jdkd.errors import InputError
from jdkd.export.drawing import drawn, read_picture
from tests.data.test_images import twelve_bits

RAMP = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)


def turned(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(file.with_suffix(".jpg"), exif=exif)
    return file.with_suffix(".jpg")


def saved(mode):
    def save(file):
        Image.fromarray(RAMP).convert(mode).save(file)
        return file

    return save


def transparent(file):
    picture = Image.fromarray(RAMP).convert("RGBA")
    picture.putalpha(30)
    picture.save(file)
    return file


def deep(file):
    Image.fromarray(RAMP[..., 0].astype(np.uint16) * 257).save(file)
    return file


def twelve(file):
    file.with_suffix(".tif").write_bytes(twelve_bits(RAMP[..., 0].astype(np.uint16) * 16))
    return file.with_suffix(".tif")


KINDS = [turned, saved("RGB"), saved("L"), saved("P"), saved("LA"), transparent, deep, twelve]


@pytest.mark.parametrize("save", KINDS)
def test_images_are_read_as_everywhere(save, tmp_path):
    file = save(tmp_path / "a.png")
    assert np.array_equal(read_picture(file), read_image(file).permute(1, 2, 0).numpy())


def test_images_of_32_bits_are_refused(tmp_path):
    Image.fromarray(RAMP[..., 0].astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif has 32 bits a sample"):
        read_picture(tmp_path / "a.tif")


def test_boxes_labels_and_masks_are_drawn_where_they_are():
    image = np.full((100, 160, 3), 90, dtype=np.uint8)
    mask = np.zeros((1, 100, 160), dtype=np.float32)
    mask[0, 60:70, 60:90] = 1
    found = {
        "boxes": np.array([[50, 40, 110, 80]], dtype=np.float32),
        "labels": np.array([1]),
        "scores": np.array([0.9], dtype=np.float32),
        "masks": mask,
    }
    with Image.open(io.BytesIO(drawn(image, found, ("cell",)))) as picture:
        assert picture.format == "JPEG"
        changed = np.abs(np.asarray(picture).astype(int) - 90).max(axis=2) > 25
    assert changed[40, 55:105].all() and changed[45:75, 50].all() and changed[62:68, 62:88].all()
    assert not changed[45:58, 55:105].any() and not changed[85:].any() and changed[:39, 50:80].any()
    nothing = {name: values[:0] for name, values in found.items()}
    with Image.open(io.BytesIO(drawn(image, nothing, ()))) as picture:
        assert np.abs(np.asarray(picture).astype(int) - 90).max() < 3
