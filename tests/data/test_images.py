"""Every kind of image file becomes RGB as its annotations mean it; a broken one is named."""

import numpy as np
import pytest
from PIL import Image

from jdkd.data import CocoDetectionDataset
from jdkd.data.images import read_image
from jdkd.errors import InputError

from . import folders

ROTATED, UPSIDE_DOWN = 6, 3  # EXIF orientations: stored a quarter turned, stored upside down


def gradient(width=6, height=4):
    """RGB pixels [height, width, 3] that tell every place from every other."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 40, columns * 40, 200 - rows * 20 - columns * 10], axis=-1).astype(np.uint8)


def read(path, width=6, height=4):
    """Pixels [height, width, 3] as read."""
    return read_image(path, (width, height)).permute(1, 2, 0).numpy()


def test_rgb_is_read_as_it_is(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == gradient()).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_scale_becomes_three_equal_channels(tmp_path, mode):
    grey = Image.fromarray(gradient()).convert("L").convert(mode)
    grey.save(tmp_path / "a.png")
    expected = np.asarray(grey.convert("L"))
    assert (read(tmp_path / "a.png") == expected[..., None]).all()


def test_alpha_is_dropped_and_the_colour_under_it_kept(tmp_path):
    alpha = np.zeros((4, 6, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([gradient(), alpha], axis=-1)).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == gradient()).all()


def test_palettes_are_looked_up_even_with_transparency(tmp_path):
    indexed = Image.fromarray(gradient()).quantize(24)
    indexed.save(tmp_path / "a.png", transparency=bytes(range(24)))
    assert (read(tmp_path / "a.png") == np.asarray(indexed.convert("RGB"))).all()


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2700
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == (deep >> 8)[..., None]).all()


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read(tmp_path / "a.jpg").reshape(-1, 3).astype(int).T
    assert (red > 240).all() and (green < 15).all() and (blue < 15).all()


def oriented(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def test_a_rotated_photograph_is_turned_to_the_annotated_size(tmp_path):
    oriented(tmp_path / "a.png", gradient(6, 4), ROTATED)
    assert (read(tmp_path / "a.png", 4, 6) == np.rot90(gradient(6, 4), -1)).all()


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90),
        (9, lambda p: p),
    ],
)
def test_every_orientation_is_shown_as_the_standard_says(tmp_path, orientation, shown):
    oriented(tmp_path / "a.png", gradient(), orientation)
    expected = shown(gradient())
    assert (read(tmp_path / "a.png", *expected.shape[1::-1]) == expected).all()


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match=r"image .*/a\.png cannot be read"):
        read(tmp_path / "a.png")


def test_it_stays_unturned_where_the_annotations_mean_the_stored_pixels(tmp_path):
    oriented(tmp_path / "a.png", gradient(6, 4), ROTATED)
    assert (read(tmp_path / "a.png", 6, 4) == gradient(6, 4)).all()


def test_it_is_shown_upright_where_both_sizes_agree(tmp_path):
    oriented(tmp_path / "a.png", gradient(6, 4), UPSIDE_DOWN)
    assert (read(tmp_path / "a.png", 6, 4) == gradient(6, 4)[::-1, ::-1]).all()


def test_another_size_than_annotated_is_refused_with_both(tmp_path):
    oriented(tmp_path / "a.png", gradient(6, 4), ROTATED)
    with pytest.raises(InputError, match=r"a\.png is 4 x 6 pixels but its annotations say 5 x 4; put the image"):
        read(tmp_path / "a.png", 5, 4)


def truncated(path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.gif", "a.webp"])
def test_a_truncated_image_is_named(tmp_path, name):
    truncated(tmp_path / name)
    with pytest.raises(
        InputError, match=rf"image .*/{name} cannot be read \(.*\): .*; put a sound copy of it in its place"
    ):
        read(tmp_path / name, 64, 64)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"image .*/a\.png cannot be read"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", ["float32", "int32", "int16"])
def test_samples_without_a_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.zeros((4, 6), dtype=dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(
        InputError, match=r"a\.tiff has samples of 32 bits or with a sign .*; save it with 8 or 16 bits"
    ):
        read(tmp_path / "a.tiff")


def test_an_image_that_vanished_after_opening_is_named(tmp_path):
    split = folders.write(tmp_path)
    dataset = CocoDetectionDataset(split)
    (split.images / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png is missing"):
        dataset[1]
