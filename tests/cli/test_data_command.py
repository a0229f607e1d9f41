"""`jdkd data check`, and what training, evaluation and timing do with data that are not clean."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

BLOOD_CELLS = Path(__file__).parents[3] / "shared" / "data" / "blood-cells"


@pytest.fixture
def dirty(squares, tmp_path):
    """The squares with a box without area and one over the edge in each split."""
    folder = tmp_path / "dirty"
    shutil.copytree(squares, folder)
    for file in (folder / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["annotations"][0].update(bbox=[5, 5, 0, 0])
        content["annotations"][1].update(bbox=[50, 50, 500, 10])
        file.write_text(json.dumps(content))
    return folder


def told(answer):
    return [line for line in answer.err.splitlines() if line.startswith("jdkd: ")]


def test_check_finds_nothing_wrong_with_sound_data(jdkd, squares):
    answer = jdkd("data", "check", squares)
    assert (answer.code, told(answer)) == (0, []), answer.err
    assert [line.partition(": ")[2] for line in answer.out.splitlines()] == [
        "12 images, 12 boxes, 2 classes: nothing wrong",
        "4 images, 4 boxes, 2 classes: nothing wrong",
    ]


def test_check_lists_repairs_and_ends_well_unless_it_is_strict(jdkd, dirty):
    answer = jdkd("data", "check", dirty)
    assert (answer.code, told(answer)) == (0, []), answer.err
    assert "annotation 1 [5, 5, 0, 0] in 1.png of 64 x 64 px" in answer.out
    assert "annotation 102 [50, 50, 500, 10] in 102.png of 64 x 64 px" in answer.out
    strict = jdkd("data", "check", dirty, "--strict")
    assert strict.code == 2 and "4 errors in" in told(strict)[0]


def test_check_lists_every_error_with_its_file(jdkd, dirty):
    broken = [dirty / "train2017" / f"{i}.png" for i in (3, 4, 5)]
    for file in broken:
        file.write_bytes(file.read_bytes()[:50])
    (dirty / "val2017" / "103.png").unlink()
    annotations = dirty / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["annotations"][2]["category_id"] = 9
    content["images"][3]["file_name"] = "\ud800\0.png"
    annotations.write_text(json.dumps(content))
    answer = jdkd("data", "check", dirty)
    assert answer.code == 2 and "Traceback" not in answer.err
    lines = answer.out.splitlines()
    for file in [*broken, dirty / "val2017" / "103.png"]:
        assert sum(f"image {file} " in line for line in lines) == 1, answer.out
    assert sum("refers to category 9" in line for line in lines) == 1
    assert "6 errors in" in told(answer)[0] and str(annotations) in told(answer)[0]


def test_check_takes_flags_and_several_folders(jdkd, squares, dirty):
    flags = ("--val-images", squares / "val2017", "--val-annotations", squares / "annotations/instances_val2017.json")
    alone = jdkd("data", "check", *flags)
    assert alone.code == 0 and len(alone.out.splitlines()) == 1
    both = jdkd("data", "check", squares, dirty)
    assert both.code == 0 and both.out.count("nothing wrong") == 2 and both.out.count("2 repairs") == 2


def test_check_of_a_folder_with_one_split_lists_the_other_as_missing(jdkd, squares, tmp_path):
    shutil.copytree(squares, tmp_path / "half")
    (tmp_path / "half" / "annotations" / "instances_val2017.json").unlink()
    answer = jdkd("data", "check", tmp_path / "half")
    assert answer.code == 2 and "12 images, 12 boxes, 2 classes: nothing wrong" in answer.out
    assert answer.out.count("instances_val2017.json does not exist") == 1


@pytest.mark.parametrize("arguments", [(), ("nowhere",), ("--val-images", "nowhere")])
def test_check_of_nothing_is_one_sentence(jdkd, arguments):
    answer = jdkd("data", "check", *arguments)
    assert answer.code == 2 and len(told(answer)) == 1 and answer.out == ""


def test_dirty_data_are_trained_on_with_a_word_and_refused_when_strict(jdkd, train_arguments, dirty, tmp_path):
    arguments = [*train_arguments]
    arguments[arguments.index("--data") + 1] = dirty
    strict = jdkd(*arguments, "--out", tmp_path / "strict", "--strict")
    assert strict.code == 2 and "--strict refuses" in told(strict)[0] and not (tmp_path / "strict").exists()
    answer = jdkd(*arguments, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert len(told(answer)) == 4, "each kind once for each file"
    assert "1 of 12 boxes without area, left out: annotation 1 [5, 5, 0, 0] in 1.png" in answer.err
    assert "1 of 4 boxes over the edge of their image, clipped: annotation 102 " in answer.err
    for command in (("eval", tmp_path / "out"), ("latency", tmp_path / "out"), ("search", "--base", tmp_path / "out")):
        out = ("--out", tmp_path / "found") if command[0] == "search" else ()
        refused = jdkd(*command, "--data", dirty, *out, "--strict")
        assert refused.code == 2 and "--strict refuses" in told(refused)[-1], command


def test_all_unusable_images_are_found_before_the_first_step(jdkd, train_arguments, dirty, tmp_path):
    for i in (3, 4):
        file = dirty / "train2017" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:50])
    arguments = [*train_arguments]
    arguments[arguments.index("--data") + 1] = dirty
    answer = jdkd(*arguments, "--out", tmp_path / "out")
    assert answer.code == 2 and not (tmp_path / "out").exists()
    assert "3.png cannot be read" in told(answer)[-1] and "lists all 2 problems" in told(answer)[-1]


def test_timing_decodes_image_files_as_training_does(jdkd, trained, tmp_path, monkeypatch):
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(deep).save(tmp_path / "deep.png")
    seen = []

    def measure_grid(work, grid, progress):
        seen.extend(work.images)
        raise KeyboardInterrupt

    monkeypatch.setattr("jdkd.latency.measure_grid", measure_grid)
    jdkd("latency", trained, "--images", tmp_path / "deep.png")
    assert torch.equal(seen[0], torch.from_numpy((deep >> 8).astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["above Pillow's limit", "32 bits", "empty", "a folder"])
def test_timing_refuses_image_files_that_training_refuses(jdkd, trained, tmp_path, monkeypatch, kind):
    file = tmp_path / "a.tiff"
    if kind == "a folder":
        file.mkdir()
    elif kind == "empty":
        file.touch()
    else:
        Image.fromarray(np.zeros((64, 64), dtype=np.float32 if kind == "32 bits" else np.uint8)).save(file)
    if kind == "above Pillow's limit":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    answer = jdkd("latency", trained, "--images", file)
    assert (
        answer.code == 2 and len(told(answer)) == 1 and str(file) in told(answer)[0] and "Traceback" not in answer.err
    )


@pytest.mark.skipif(not BLOOD_CELLS.is_dir(), reason="the photographs in ../shared are not there")
def test_published_photographs_with_two_boxes_without_area_can_be_used(jdkd):
    answer = jdkd("data", "check", BLOOD_CELLS)
    assert answer.code == 0, answer.err
    assert "205 images, 2,804 boxes, 3 classes: 1 repair" in answer.out
    assert "87 images, 1,137 boxes, 3 classes: 1 repair" in answer.out
    assert "annotation 2288 [181, 329, 0, 0] in BloodImage_00343.jpg of 640 x 480 px" in answer.out
