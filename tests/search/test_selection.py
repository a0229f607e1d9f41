"""Which images select and which report: new to every training and to each other, and said."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jdkd.data import CocoDetectionDataset, Split
from jdkd.data.copies import copies
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.run_folder import RunFolder
from jdkd.search.selection import divide, say_if_trained_elsewhere
from jdkd.train.record import trained_on


@pytest.fixture
def scenes(tmp_path):
    """Writes a split: one tuple of labels an image, those of crowds negative; equal ``looks`` give equal files."""

    def write(name, labels, looks=None, names=None, classes=2):
        folder = tmp_path / name
        folder.mkdir()
        looks = looks or [f"{name} {i}" for i in range(len(labels))]
        names = names or [f"{i}.png" for i in range(len(labels))]
        boxes = [(i, label) for i, of_image in enumerate(labels) for label in of_image]
        for look, file_name in zip(looks, names, strict=True):
            pixels = np.random.default_rng(list(look.encode())).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / file_name)
        content = {
            "images": [{"id": i, "file_name": n, "width": 16, "height": 16} for i, n in enumerate(names)],
            "categories": [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)],
            "annotations": [
                {"id": n, "image_id": i, "category_id": abs(k), "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": int(k < 0)}
                for n, (i, k) in enumerate(boxes, start=1)
            ],
        }
        (folder / "boxes.json").write_text(json.dumps(content))
        return CocoDetectionDataset(Split(folder, folder / "boxes.json", name))

    return write


BOTH = (1, 2)


def names(part) -> list[str]:
    return [file.name for file in part.dataset.files]


def test_half_of_val_selects_and_the_other_half_reports(scenes):
    train, val = scenes("train", [BOTH] * 3), scenes("val", [BOTH] * 8)
    selection, report = divide(train, val)
    assert len(names(selection)) == len(names(report)) == 4
    assert sorted(names(selection) + names(report)) == sorted(f"{i}.png" for i in range(8))
    told = [part.to_json() for part in (selection, report)]
    assert [(part["images"], part["boxes"]) for part in told] == [(4, 8), (4, 8)]
    assert {part["annotations"] for part in told} == {str(val.split.annotations)}
    assert told[0]["which"] != told[1]["which"] and told[0]["fingerprint"] != told[1]["fingerprint"]


def test_the_half_that_an_image_is_in_follows_from_its_content_alone(scenes, tmp_path):
    train, looks = scenes("train", [BOTH]), [f"look {i}" for i in range(8)]
    selection, _ = divide(train, scenes("val", [BOTH] * 8, looks))
    again = scenes("renamed", [BOTH] * 8, looks[::-1], [f"{i}.png" for i in reversed(range(8))])
    assert sorted(names(divide(train, again)[0])) == sorted(names(selection))


def test_copies_of_an_image_are_in_one_half(scenes):
    looks = [f"look {i // 2}" for i in range(12)]
    parts = divide(scenes("train", [BOTH]), scenes("val", [BOTH] * 12, looks))
    selecting, reporting = ({int(name[:-4]) // 2 for name in names(part)} for part in parts)
    assert not selecting & reporting and len(selecting) == len(reporting) == 3


def test_both_halves_have_boxes_where_two_images_have(scenes):
    for count in range(6):
        val = scenes(f"val {count}", [()] * count + [BOTH] + [()] * 2 + [BOTH] + [()] * count)
        parts = divide(scenes(f"train {count}", [BOTH]), val)
        assert [part.boxes for part in parts] == [2, 2]
        assert [len(part.dataset) for part in parts] == [len(val) // 2, len(val) - len(val) // 2]


@pytest.mark.parametrize("labels", [[BOTH], [(), BOTH], [(), (), BOTH, ()], [BOTH, (-1,)]])
def test_a_split_too_small_to_halve_is_refused_with_the_remedy(scenes, labels):
    with pytest.raises(InputError, match=rf"{len(labels)} images.*1 of them with a box.*--selection-annotations"):
        divide(scenes("train", [BOTH]), scenes("val", labels))


def test_images_that_are_given_select_and_all_of_val_reports(scenes):
    train, val, given = scenes("train", [BOTH]), scenes("val", [BOTH]), scenes("given", [BOTH] * 3)
    selection, report = divide(train, val, given)
    assert selection.dataset is given and report.dataset is val
    assert selection.to_json()["which"] == report.to_json()["which"] == "all"


def test_training_images_neither_select_nor_report_whatever_they_are_called(scenes):
    train = scenes("train", [BOTH] * 3)
    looks = ["train 1", *(f"val {i}" for i in range(4)), "train 0"]
    val = scenes("val", [BOTH] * 6, looks)
    with pytest.warns(Notice, match=r"2 of the 6 images .* are training images too.*\(0.png, 5.png\)"):
        parts = divide(train, val)
    assert sorted(names(parts[0]) + names(parts[1])) == [f"{i}.png" for i in range(1, 5)]


def test_images_that_report_do_not_select(scenes):
    train, val = scenes("train", [BOTH]), scenes("val", [BOTH] * 2)
    given = scenes("given", [BOTH] * 3, ["val 0", "given 1", "given 2"])
    with pytest.warns(Notice, match=r"1 of the 3 images .* are validation images, which report too"):
        selection, report = divide(train, val, given)
    assert names(selection) == ["1.png", "2.png"] and len(report.dataset) == 2


@pytest.mark.parametrize(("which", "what"), [("train", "training images"), ("val", "validation images")])
def test_a_selection_of_known_images_alone_is_refused(scenes, which, what):
    splits = {"train": scenes("train", [BOTH] * 2), "val": scenes("val", [BOTH] * 2)}
    with pytest.raises(InputError, match=f"all 2 images of .* are {what}"):
        divide(splits["train"], splits["val"], scenes("given", [BOTH] * 2, [f"{which} 1", f"{which} 0"]))


def test_a_selection_left_without_a_box_is_refused(scenes):
    given = scenes("given", [BOTH, ()], ["train 0", "given 1"])
    with pytest.warns(Notice), pytest.raises(InputError, match=r"1 images .* that select .*hold no box.*score -1"):
        divide(scenes("train", [BOTH]), scenes("val", [BOTH]), given)


def test_a_class_without_a_box_is_said_once(scenes, recwarn):
    train, val, given = scenes("train", [BOTH]), scenes("val", [BOTH]), scenes("given", [(1,), ()])
    for _ in range(2):
        divide(train, val, given)
    (said,) = recwarn
    assert "2 images" in str(said.message) and "no box of 1 of the 2 classes (class 2)" in str(said.message)


def test_only_files_of_a_size_that_occurs_twice_are_read(scenes, monkeypatch):
    train, val, given = scenes("train", [BOTH] * 4), scenes("val", [BOTH]), scenes("given", [BOTH])
    shutil.copy(given.files[0], train.files[0])
    with open(train.files[1], "ab") as file:
        file.write(b"longer than any other " * 100)
    read = []
    monkeypatch.setattr("jdkd.data.copies.sha256_of", lambda file: read.append(file) or file.read_bytes())
    with pytest.raises(InputError, match="all 1 images"):
        divide(train, val, given)
    assert train.files[0] in read and train.files[1] not in read


def test_a_file_of_the_same_size_that_begins_alike_is_no_copy(scenes, monkeypatch):
    train, given = scenes("train", [BOTH] * 2), scenes("given", [BOTH])
    content = given.files[0].read_bytes()
    train.files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train.files[1].write_bytes(bytes([content[0] ^ 1]) + content[1:])
    monkeypatch.setattr("jdkd.data.copies.BEGINNING", 16)
    read = []
    monkeypatch.setattr("jdkd.data.copies.sha256_of", lambda file: read.append(file) or file.read_bytes())
    assert copies(given, train) == [] and {*read} == {given.files[0], train.files[0]}


def test_what_a_detector_was_trained_on_is_in_its_record_or_in_that_of_its_search(tmp_path):
    RunFolder(tmp_path / "base").begin("train", {"data": {"train": "these"}})
    RunFolder(tmp_path / "search").begin("search", {"data": {"train": "those"}})
    found = [trained_on(tmp_path / name) for name in ("base", "search/student", "imported")]
    assert found == ["these", "those", None]


def test_masks_make_no_other_images_of_training_data(digits, recwarn):
    train, other = digits
    say_if_trained_elsewhere("a teacher with masks over a base of boxes", train.with_masks().fingerprint, train)
    say_if_trained_elsewhere("a detector of boxes", train.fingerprint, train.with_masks())
    say_if_trained_elsewhere("one of masks", train.with_masks().fingerprint, train.with_masks())
    assert not recwarn.list and train.with_masks().masks
    for who, data in (("another", train), ("yet another", train.with_masks())):
        with pytest.warns(Notice, match=f"{who} was trained on other data than"):
            say_if_trained_elsewhere(who, other.with_masks().fingerprint, data)
