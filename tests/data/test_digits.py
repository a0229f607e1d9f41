"""Digit scenes: exact, repeatable, disjoint, and whole or not at all."""

import errno
import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from jdkd.data import CocoDetectionDataset, digits, resolve_splits, write_digit_scenes
from jdkd.errors import InputError

SMALL = {"train": 5, "val": 3, "size": 48, "seed": 4}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "scenes"
    write_digit_scenes(folder, **SMALL)
    return folder


def contents(folder):
    """Hash of every file below a folder by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rng(k):
    return np.random.default_rng([0, 0, 128, k])


def test_the_folder_opens_as_a_coco_data_set(scenes):
    train, val = (CocoDetectionDataset(split) for split in resolve_splits(scenes))
    assert (len(train), len(val)) == (5, 3)
    assert train.classes == val.classes == tuple("0123456789")
    assert not train.mirror_symmetric
    for image, target in [*train, *val]:
        assert image.shape == (3, 48, 48)
        assert 1 <= len(target["boxes"]) <= digits.MOST and target["boxes"].max() <= 48


def test_pycocotools_reads_the_files_as_they_are(scenes, capsys):
    truth = COCO(str(scenes / "annotations" / "instances_train2017.json"))
    assert len(truth.imgs) == 5 and min(truth.anns) == 1
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in truth.anns.values())


def test_equal_requests_give_equal_bytes(scenes, tmp_path):
    write_digit_scenes(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(scenes)


def test_a_scene_does_not_depend_on_how_many_are_asked_for(scenes, tmp_path):
    write_digit_scenes(tmp_path / "more", **{**SMALL, "train": 8, "val": 1})
    few, more = contents(scenes), contents(tmp_path / "more")
    images = [name for name in few if name in more and name.endswith(".png")]
    assert len(images) == 5 + 1 and all(few[name] == more[name] for name in images)


def test_another_seed_gives_other_scenes(scenes, tmp_path):
    write_digit_scenes(tmp_path / "other", **{**SMALL, "seed": 5})
    other = contents(tmp_path / "other")
    assert all(other[name] != content for name, content in contents(scenes).items() if name.endswith(".png"))


def test_one_class_changes_nothing_but_what_digits_are_called(scenes, tmp_path):
    write_digit_scenes(tmp_path / "one", **SMALL, one_class=True)
    ten, one = contents(scenes), contents(tmp_path / "one")
    assert {name for name in ten if ten[name] != one[name]} == {name for name in ten if name.endswith(".json")}
    for of_ten, of_one in zip(resolve_splits(scenes), resolve_splits(tmp_path / "one"), strict=True):
        pairs = zip(CocoDetectionDataset(of_ten), CocoDetectionDataset(of_one), strict=True)
        assert CocoDetectionDataset(of_one).classes == ("digit",)
        for (_, target), (_, again) in pairs:
            assert again["boxes"].equal(target["boxes"]) and again["labels"].unique().tolist() == [1]
    with pytest.raises(InputError, match=r"other digit scenes \(one_class was True and is False\)"):
        write_digit_scenes(tmp_path / "one", **SMALL, resume=True)


def test_the_splits_have_scenes_of_their_own(scenes):
    for k in range(SMALL["val"]):
        train, val = (np.asarray(Image.open(scenes / f"{split}2017" / f"{k:06d}.png")) for split in ("train", "val"))
        assert (train == val).all(-1).mean() < 0.2


def test_no_digit_is_in_both_splits():
    (train, train_labels), (val, val_labels) = digits._digits("train"), digits._digits("val")
    assert len(train) + len(val) == 1797 and len(val) >= 300
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in val}
    assert set(train_labels) == set(val_labels) == set(range(10))


def test_boxes_are_tight_around_the_ink(monkeypatch):
    painted = []
    paint = digits._paint
    monkeypatch.setattr(digits, "_paint", lambda *args: (painted.append(args[1:3]), paint(*args)))
    found = [box for k in range(20) for box, _ in digits.scene(128, rng(k), "train")[1]]
    assert len(found) == len(painted) > 40
    for box, (ink, painted_box) in zip(found, painted, strict=True):
        assert box == painted_box and ink.shape == (box[3], box[2])
        shows = ink > 0
        assert shows[0].any() and shows[-1].any() and shows[:, 0].any() and shows[:, -1].any()


def test_only_the_inside_of_boxes_changes(monkeypatch):
    with_digits, found, _ = digits.scene(128, rng(3), "train")
    monkeypatch.setattr(digits, "_paint", lambda *args: None)
    monkeypatch.setattr(digits, "_place", lambda *args: None)
    without, none, _ = digits.scene(128, rng(3), "train")
    outside = np.ones((128, 128), dtype=bool)
    for (x, y, width, height), _ in found:
        outside[y : y + height, x : x + width] = False
    assert none == [] and outside.any()
    assert (with_digits[outside] == without[outside]).all()
    assert (with_digits[~outside] != without[~outside]).any()


def test_segmentations_are_the_ink_that_no_later_digit_hides(scenes):
    (train, _) = resolve_splits(scenes)
    truth, hidden = CocoDetectionDataset(train).with_masks(), 0
    for image, target in truth:
        assert target["masks"].sum(0).max() == 1, "a pixel is of one digit"
        for (left, top, right, bottom), mask in zip(target["boxes"].long().tolist(), target["masks"], strict=True):
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum() > 0.1 * inside.numel()
            hidden += not all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            ink, around = image[:, mask == 1].float().mean(), image[:, top:bottom, left:right].float().mean()
            assert ink > around, "ink is bright"
    assert hidden < len(truth) * 2


@pytest.mark.parametrize("size", [32, 128, 300])
def test_digits_come_at_many_scales_with_bounded_overlap(size):
    counts, heights = [], []
    for k in range(40):
        picture, found, _ = digits.scene(size, np.random.default_rng([0, 0, size, k]), "val")
        boxes = [box for box, _ in found]
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        assert all(x >= 0 and y >= 0 and x + w <= size and y + h <= size and w > 1 and h > 3 for x, y, w, h in boxes)
        hidden = [digits._hidden(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
        assert max(hidden, default=0) <= digits.MOST_HIDDEN
        counts.append(len(boxes))
        heights += [box[3] / size for box in boxes]
    assert min(counts) >= 1 and max(counts) <= digits.MOST and 3 < np.mean(counts) < 6
    assert min(heights) < 0.2 and max(heights) > 0.4 and max(heights) < 0.6


def test_progress_is_told_after_every_scene(tmp_path):
    told = []
    write_digit_scenes(tmp_path / "out", **SMALL, progress=lambda done, total, facts: told.append((done, total)))
    assert told == [(done, 8) for done in range(1, 9)]


def test_resume_leaves_the_same_scenes_alone(scenes):
    stamps = {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}
    write_digit_scenes(scenes, **SMALL, resume=True)
    assert {path: path.stat().st_mtime_ns for path in scenes.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("changed", "resume", "said"),
    [
        ({}, False, "already holds these digit scenes; .*--resume"),
        ({"seed": 5, "train": 6}, True, r"other digit scenes \(train was 5 and is 6, seed was 4 and is 5\)"),
        ({"size": 64}, False, r"other digit scenes \(size was 48 and is 64\)"),
    ],
)
def test_scenes_that_are_there_already_are_never_overwritten(scenes, changed, resume, said):
    before = contents(scenes)
    with pytest.raises(InputError, match=said):
        write_digit_scenes(scenes, **{**SMALL, **changed}, resume=resume)
    assert contents(scenes) == before and [path.name for path in scenes.parent.iterdir()] == [scenes.name]


@pytest.mark.parametrize("file", ["notes.txt", "annotations/instances_train2017.json"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, file):
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    (tmp_path / "out" / file).write_text(json.dumps({"info": {"request": {}}}))
    with pytest.raises(InputError, match=f"out holds {file.split('/')[0]}, which is no finished folder of digit"):
        write_digit_scenes(tmp_path / "out", **SMALL, resume=True)
    assert list(contents(tmp_path)) == [f"out/{file}"]


def test_a_file_cannot_become_the_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="out is a file"):
        write_digit_scenes(tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match=r"deeper cannot be a folder to write to: .*out is a file"):
        write_digit_scenes(tmp_path / "out" / "deeper", **SMALL)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    write_digit_scenes(tmp_path / "empty", **SMALL)
    write_digit_scenes(tmp_path / "a" / "b", **SMALL)
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b") != {}


def test_the_folder_one_stands_in_is_not_swapped_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the folder you are in"):
        write_digit_scenes(".", **SMALL)
    assert list(tmp_path.iterdir()) == []
    write_digit_scenes("below", **SMALL)
    assert (tmp_path / "below" / "val2017").is_dir()


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path, scenes):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_digit_scenes(tmp_path / "link", **SMALL)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == contents(scenes)


def test_an_interruption_from_the_progress_display_leaves_nothing(tmp_path):
    def stop(done, total, facts):
        if done == SMALL["train"] + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(tmp_path / "out", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("folder_was_there", [False, True])
def test_what_is_interrupted_leaves_nothing_half_written(tmp_path, monkeypatch, failure, folder_was_there):
    if folder_was_there:
        (tmp_path / "out").mkdir()
    save, saved = Image.Image.save, []

    def fail_at_the_sixth(self, *args, **kwargs):
        saved.append(args)
        if len(saved) == 6:
            raise failure
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail_at_the_sixth)
    with pytest.raises((KeyboardInterrupt, InputError)) as raised:
        write_digit_scenes(tmp_path / "out", **SMALL)
    if isinstance(failure, OSError):
        assert str(tmp_path / "out") in str(raised.value) and "No space left" in str(raised.value)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"] * folder_was_there


def test_what_a_killed_run_left_is_swept_away(tmp_path, scenes):
    (tmp_path / ".out.partial" / "train2017").mkdir(parents=True)
    (tmp_path / ".out.partial" / "train2017" / "stale.png").write_text("half")
    write_digit_scenes(tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == contents(scenes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"size": 31}, {"seed": -1}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"{name} is {value} but must be at least"):
        write_digit_scenes(tmp_path / "out", **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []
