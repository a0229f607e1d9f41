"""Every kind of image file becomes RGB as its annotations mean it; a broken one is named."""

import os
import struct

import numpy as np
import pytest
from PIL import Image

from jdkd.data import CocoDetectionDataset, images
from jdkd.data.images import ImageFault, no_warnings, read_image, verify_image
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


def twelve_bits(samples):
    """A grey TIFF of 12 bits a sample, two of them in three bytes; Pillow writes none."""
    height, width = samples.shape
    pairs = samples.reshape(-1, 2).astype(int)
    data = b"".join(((first << 12) | second).to_bytes(3, "big") for first, second in pairs.tolist())
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_keep_their_upper_eight(tmp_path):
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 170
    (tmp_path / "a.tiff").write_bytes(twelve_bits(deep))
    assert (read(tmp_path / "a.tiff") == (deep >> 4)[..., None]).all()


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


@pytest.mark.parametrize("times", [1.0, 1.9, 2.1])
def test_an_image_above_pillows_limit_is_refused_with_advice_and_one_below_read(tmp_path, monkeypatch, times):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(24 / times))
    if times < 2:
        assert (read(tmp_path / "a.png") == gradient()).all()
        return
    with pytest.raises(InputError, match=r"a\.png has more than the 22 pixels that Pillow decodes; cut it into tiles"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.gif", "a.tiff", "a.png", "a.webp"])
def test_of_several_frames_the_first_is_read(tmp_path, name):
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    exact = {"lossless": True} if name == "a.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **exact)
    assert (read(tmp_path / name) == (250, 0, 0)).all()


def test_damaged_exif_data_do_not_make_an_image_unreadable(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF at all", quality=95)
    assert read(tmp_path / "a.jpg").shape == (4, 6, 3)


def test_a_png_with_a_wrong_checksum_is_named(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    place = content.index(b"IDAT")
    content[place + 8] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png cannot be read \(.*\): it is truncated or damaged"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.touch(), "it is empty"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.symlink_to("nowhere"), "it is a link to nothing"),
        (os.mkfifo, "it is no file"),
        (lambda path: path.write_text("<html>not found</html>"), "it is not an image of a kind that Pillow knows"),
    ],
)
def test_what_is_there_in_place_of_an_image_is_said(tmp_path, make, what):
    make(tmp_path / "a.jpg")
    for attempt in (read, lambda path: verify_image(path, (6, 4), decode=False)):
        with pytest.raises((InputError, ImageFault), match=f"cannot be read: {what}"):
            attempt(tmp_path / "a.jpg")


KINDS = {
    "a.jpg": {},
    "progressive.jpg": {"progressive": True},
    "a.png": {},
    "a.gif": {},
    "a.bmp": {},
    "a.webp": {},
    "a.tiff": {},
    "packed.tiff": {"compression": "tiff_lzw"},
    "a.ppm": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_fast_check_finds_truncation_at_any_place(tmp_path, name):
    file = tmp_path / name
    Image.effect_noise((64, 48), 90).convert("RGB").save(file, **KINDS[name])
    whole = file.read_bytes()
    verify_image(file, (64, 48), decode=False)
    for kept in (len(whole) - 30, len(whole) // 2, 40):
        file.write_bytes(whole[:kept])
        with pytest.raises(ImageFault, match="cannot be read"), no_warnings():
            verify_image(file, (64, 48), decode=False)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "a.ppm"])
def test_the_fast_check_decodes_no_sound_image(tmp_path, monkeypatch, name):
    Image.fromarray(gradient()).save(tmp_path / name, **KINDS[name])
    monkeypatch.setattr(images, "_decoded", None)
    verify_image(tmp_path / name, (6, 4), decode=False)


def test_what_lies_behind_the_end_of_a_photograph_is_no_damage(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg")
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"trailer of a telephone")
    verify_image(tmp_path / "a.jpg", (6, 4), decode=False)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_check_takes_the_sizes_that_reading_takes(tmp_path, orientation, decode):
    oriented(tmp_path / "a.png", gradient(6, 4), orientation)
    for size in ((6, 4), (4, 6), (5, 4)):
        try:
            read(tmp_path / "a.png", *size)
        except InputError:
            with pytest.raises(ImageFault, match="pixels but its annotations say"):
                verify_image(tmp_path / "a.png", size, decode=decode)
        else:
            verify_image(tmp_path / "a.png", size, decode=decode)


def test_damage_inside_is_found_by_decoding(tmp_path):
    Image.effect_noise((64, 48), 90).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    verify_image(tmp_path / "a.png", (64, 48), decode=False)
    with pytest.raises(ImageFault, match="cannot be read"), no_warnings():
        verify_image(tmp_path / "a.png", (64, 48), decode=True)


def test_an_image_that_vanished_after_opening_is_named(tmp_path):
    split = folders.write(tmp_path)
    dataset = CocoDetectionDataset(split)
    (split.images / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png is missing"):
        dataset[1]


def pillows(path):
    """Pixels [height, width, 3] as Pillow decodes them, turned as they are shown."""
    from PIL import ImageOps

    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


@pytest.mark.parametrize("orientation", [1, 2, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("how", [{"quality": 30, "subsampling": 2}, {"quality": 95, "progressive": True}])
def test_every_jpeg_has_the_pixels_that_pillow_decodes(tmp_path, mode, how, orientation):
    noise = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).resize((61, 43)).convert(mode).save(tmp_path / "a.jpg", exif=exif, **how)
    assert (read_image(tmp_path / "a.jpg").permute(1, 2, 0).numpy() == pillows(tmp_path / "a.jpg")).all()


def test_a_common_jpeg_is_not_decoded_by_pillow(tmp_path, monkeypatch):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "_decoded", None)
    assert read(tmp_path / "a.jpg").shape == (4, 6, 3)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_truncated_jpeg_is_named_whoever_decodes_it(tmp_path, kept):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"a\.jpg cannot be read .*truncated"):
        read_image(tmp_path / "a.jpg")
