"""All that is wrong with a folder is found before anything is trained."""

import shutil
import threading

import pytest
from PIL import Image

from jdkd.data import CocoDetectionDataset, checking, resolve_splits
from jdkd.data.checking import compare_splits, inspect_split
from jdkd.errors import InputError
from jdkd.notices import Notice

from . import folders


def told(problems):
    """The cases of each kind of problem."""
    return {problem.kind: list(problem.cases) for problem in problems}


def spoil_images(split):
    """Four images that cannot be used, each for another reason; image 4 stays sound."""
    (split.images / "0.png").unlink()
    (split.images / "1.png").write_bytes((split.images / "1.png").read_bytes()[:60])
    Image.new("RGB", (9, 9)).save(split.images / "2.png")
    (split.images / "3.png").write_text("no image")


@pytest.mark.parametrize("decode", [False, True])
def test_every_unusable_image_is_found_with_its_file(tmp_path, decode):
    split = folders.write(tmp_path, images=5)
    spoil_images(split)
    found = inspect_split(split, decode=decode)
    assert {kind: len(cases) for kind, cases in told(found.problems).items()} == {
        "missing images": 1,
        "images that cannot be read": 2,
        "images of another size than annotated": 1,
    }
    cases = [case for cases in told(found.problems).values() for case in cases]
    assert sorted(case.split()[1] for case in cases) == [str(split.images / f"{i}.png") for i in range(4)]
    assert found.summary.endswith("5 images, 10 boxes, 2 classes: 4 errors")
    with pytest.raises(InputError, match="lists all 4 problems, 3 of other kinds among them"):
        CocoDetectionDataset(split)


def test_faults_of_annotations_do_not_hide_those_of_images(tmp_path):
    split = folders.write(tmp_path, lambda c: c["annotations"][0].update(category_id=99))
    (split.images / "2.png").unlink()
    assert list(told(inspect_split(split).problems)) == ["an unknown category", "missing images"]


def test_a_sound_folder_has_nothing_wrong(tmp_path):
    found = inspect_split(folders.write(tmp_path), decode=True)
    assert found.problems == [] and found.summary == "3 images, 3 boxes, 2 classes: nothing wrong"
    assert len(set(found.digests)) == 3


def test_a_file_that_is_no_annotation_file_has_nothing_usable(tmp_path):
    split = folders.write(tmp_path)
    split.annotations.write_text("no json")
    found = inspect_split(split)
    assert found.summary == "nothing usable: 1 error" and list(told(found.problems)) == ["no JSON"]


@pytest.mark.parametrize("name", ["deep\\er\\2.png", "deep/er\\2.png", "deep/er/2.png", ".\\deep\\..\\deep/er/2.png"])
def test_backslashes_separate_folders(tmp_path, name):
    split = folders.write(tmp_path, lambda c: c["images"][0].update(file_name=name))
    (split.images / "deep/er").mkdir(parents=True)
    (split.images / "2.png").rename(split.images / "deep/er/2.png")
    assert CocoDetectionDataset(split)[2][0].shape == (3, folders.HEIGHT, folders.WIDTH)


def test_a_file_with_a_backslash_in_its_name_is_found_too(tmp_path):
    split = folders.write(tmp_path, lambda c: c["images"][0].update(file_name="deep\\2.png"))
    (split.images / "2.png").rename(split.images / "deep\\2.png")  # as careless archivers unpack it
    assert CocoDetectionDataset(split)[2][0].shape == (3, folders.HEIGHT, folders.WIDTH)


@pytest.mark.parametrize(("named", "there"), [("2.png", "2.PNG"), ("\u00e4.png", "a\u0308.png")])
def test_a_file_of_nearly_that_name_is_pointed_out(tmp_path, named, there):
    split = folders.write(tmp_path, lambda c: c["images"][0].update(file_name=named))
    (split.images / "2.png").rename(split.images / there)
    with pytest.raises(InputError, match=f"{named} is missing, but '{there}' is there; put them there or correct"):
        CocoDetectionDataset(split)


def test_copies_of_an_image_are_found_by_decoding_all(tmp_path):
    split = folders.write(tmp_path)
    shutil.copy(split.images / "0.png", split.images / "2.png")
    (problem,) = inspect_split(split, decode=True).problems
    assert (problem.severity, list(problem.cases)) == ("warning", ["image 2.png is the same as 0.png"])
    assert inspect_split(split).problems == []


def test_training_images_among_those_to_validate_on_are_found(tmp_path):
    train, val = folders.write(tmp_path, name="train"), folders.write(tmp_path, name="val")
    Image.new("RGB", (folders.WIDTH, folders.HEIGHT), (9, 9, 9)).save(val.images / "0.png")
    found = [inspect_split(split, decode=True) for split in (train, val)]
    (problem,) = compare_splits(*found)
    assert problem.severity == "warning" and problem.count == 2
    assert next(problem.cases) == f"image 1.png is {train.images / '1.png'}"


def test_splits_of_other_classes_are_an_error(tmp_path):
    train = folders.write(tmp_path, name="train")
    val = folders.write(tmp_path, lambda c: c["categories"][0].update(name="eight"), name="val")
    problems = compare_splits(inspect_split(train), inspect_split(val))
    assert "has the classes three, eight (2), the training data three, seven (2)" in problems[0].sentence


def test_strict_reaches_a_data_set_through_its_split(tmp_path):
    for name in ("train", "val"):
        folders.write(tmp_path, lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 0]), name=name)
    with pytest.raises(InputError, match=r"1 of 6 boxes without area, left out: .*; --strict refuses that"):
        CocoDetectionDataset(resolve_splits(tmp_path, strict=True)[0])
    with pytest.warns(Notice):
        CocoDetectionDataset(resolve_splits(tmp_path)[1])


def test_progress_is_reported_for_every_image(tmp_path):
    reported = []
    CocoDetectionDataset(folders.write(tmp_path, images=5), progress=lambda done, total: reported.append((done, total)))
    assert reported == [(i, 5) for i in range(1, 6)]


def test_an_interrupted_check_looks_at_no_more_images(tmp_path, monkeypatch):
    split = folders.write(tmp_path, images=200)
    looked, first = [], threading.Event()

    def verify(path, size, decode):
        looked.append(path)
        first.wait(0.01)

    def interrupt(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "verify_image", verify)
    with pytest.raises(KeyboardInterrupt):
        inspect_split(split, progress=interrupt)
    assert 0 < len(looked) < 100


def test_a_hundred_thousand_faults_of_a_kind_are_one_sentence(tmp_path):
    def many(content):
        content["annotations"] += [{**content["annotations"][0], "id": 1000 + i, "bbox": 3} for i in range(100_000)]

    (problem,) = inspect_split(folders.write(tmp_path, many)).problems
    assert (
        problem.count == 100_000
        and next(problem.cases) == 'annotation 1000 has "bbox" 3, not a list of 4 finite numbers'
    )
    assert problem.sentence.count("annotation 1") == 1
