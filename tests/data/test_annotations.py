"""Annotation files, sound and spoilt one thing at a time, without any image."""

import json
import math
import time

import numpy as np
import pytest

from jdkd.data.annotations import inspect_annotations
from jdkd.errors import InputError

from .annotation_files import HEIGHT, WIDTH, box, content, image, only, read_annotations, without, write_annotations


def test_a_sound_file_comes_out_as_arrays_in_order_of_ids(read):
    found = read(content())
    assert found.image_ids.tolist() == [10, 20]
    assert found.file_names == ["10.png", "20.png"]
    assert found.sizes.tolist() == [[WIDTH, HEIGHT]] * 2
    assert (found.classes, found.categories.tolist()) == (("cat", "dog"), [7, 90])
    assert found.boxes.dtype == np.float32
    assert found.boxes.tolist() == [[1.5, 2.5, 4.5, 6.5], [5, 6, 15, 14]]
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [1, 2]
    assert found.offsets.tolist() == [0, 1, 2]


def test_every_image_keeps_its_own_size(read):
    small, large = image(20, width=16, height=14), image(10, width=640, height=480)
    found = read(content(images=[small, large], annotations=[box(1, 10, bbox=(600, 400, 40, 80)), box(2, 20)]))
    assert found.sizes.tolist() == [[640, 480], [16, 14]]
    assert found.boxes.tolist() == [[600, 400, 640, 480], [5, 6, 15, 14]]


def test_boxes_of_an_image_keep_the_order_of_the_file(read):
    boxes = [(x, 0, 2, 2) for x in (9, 3, 6)]
    found = read(only(box(5, 20, bbox=boxes[0]), box(4, 10), box(3, 20, bbox=boxes[1]), box(9, 20, bbox=boxes[2])))
    assert found.boxes[found.offsets[1] : found.offsets[2], 0].tolist() == [9, 3, 6]


@pytest.mark.parametrize("text", ["", "{", "<xml/>", '{"images": [}', "[" * 100_000, '{"images": ' + "9" * 5000 + "}"])
def test_what_is_not_json_is_refused(refusal, text):
    assert "is not JSON" in refusal(text)


def test_binary_content_is_refused_as_not_json(tmp_path):
    file = tmp_path / "instances.json"
    file.write_bytes(b"\xff\xd8\xff\xe0 a picture")
    with pytest.raises(InputError, match=r"instances\.json: is not JSON"):
        read_annotations(file)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content()), encoding="utf-8-sig")
    assert len(read_annotations(file).boxes) == 2


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read .*give a COCO annotation file") as caught:
            read_annotations(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(("what", "kind"), [([], "list"), (3, "int"), ('"images"', "str"), ("null", "NoneType")])
def test_json_of_another_kind_is_refused(refusal, what, kind):
    assert f"holds a {kind}, not an object" in refusal(what)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_or_mistyped_list_is_named(refusal, key):
    assert f'has no "{key}"' in refusal(without(content(), key))
    assert f'has dict instead of a list as "{key}"' in refusal(content(**{key: {}}))
    assert f'"{key}"[0]' in (sentence := refusal(content(**{key: ["wrong"]}))) and "'wrong'" in sentence


@pytest.mark.parametrize(
    ("key", "field"),
    [
        *[("images", field) for field in ("id", "file_name", "width", "height")],
        *[("annotations", field) for field in ("id", "image_id", "category_id", "bbox")],
        *[("categories", field) for field in ("id", "name")],
    ],
)
def test_a_missing_field_is_named_with_its_record(refusal, key, field):
    records = content()[key]
    records[1] = without(records[1], field)
    kind = {"images": "image", "annotations": "annotation", "categories": "category"}[key]
    named = f"{kind} number 1" if field == "id" else f"{kind} {records[1]['id']}"
    assert f': {named} has no "{field}"; add it or remove the {kind}' in refusal(content(**{key: records}))


@pytest.mark.parametrize("value", ["10", None, 1.5, [10], {}, math.nan, math.inf, 2**63, 2**80])
@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("images", "id"),
        ("images", "width"),
        ("annotations", "id"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("categories", "id"),
    ],
)
def test_what_must_be_an_integer_and_is_none_is_shown(refusal, key, field, value):
    records = content()[key]
    records[1][field] = value
    sentence = refusal(content(**{key: records}))
    assert f'has "{field}" {value!r}, not an integer of 64 bits' in sentence


def test_big_and_negative_ids_side_by_side_are_refused_not_confused(refusal):
    assert str(2**63) in refusal(content(images=[image(-1), image(2**63)]))
    assert str(2**63) in refusal(content(images=[image(2**63), image(2**63 + 1)]))


@pytest.mark.parametrize("value", [None, "", 5, ["a.png"]])
@pytest.mark.parametrize(("key", "field"), [("images", "file_name"), ("categories", "name")])
def test_what_must_be_a_name_and_is_none_is_shown(refusal, key, field, value):
    records = content()[key]
    records[0][field] = value
    assert f' {records[0]["id"]} has "{field}" {value!r}, not a name' in refusal(content(**{key: records}))


@pytest.mark.parametrize(
    "value",
    [None, 7, "5 6 10 8", [], [5, 6, 10], [5, 6, 10, 8, 1], ["5", "6", "10", "8"], [5, 6, None, 8], [[5, 6, 10, 8]]],
)
def test_a_box_that_is_not_four_numbers_is_shown(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, bbox=value)))
    assert f'annotation 2 has "bbox" {value!r}, not a list of 4 finite numbers' in sentence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_box_with_nan_or_infinity_is_refused(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, bbox=(5, 6, value, 8))))
    assert 'annotation 2 has "bbox" [' in sentence and "finite" in sentence


@pytest.mark.parametrize("value", ["0", "1", 2, -1, None, 0.5, [], math.nan])
def test_iscrowd_is_0_or_1(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, iscrowd=value)))
    assert f'annotation 2 has "iscrowd" {value!r}, not 0 or 1' in sentence


def test_an_unknown_image_is_named(refusal):
    sentence = refusal(only(box(1, 10), box(2, 555), box(3, 556)))
    assert "annotation 2 refers to image 555, which is not among the 2 images (and 1 more" in sentence


@pytest.mark.parametrize("category", [0, 8, 91])
def test_an_unknown_category_is_named(refusal, category):
    sentence = refusal(only(box(1, 10), box(2, 20, category)))
    assert f"annotation 2 refers to category {category}, which is not among the 2 categories;" in sentence


@pytest.mark.parametrize(
    ("key", "records", "kind"),
    [
        ("images", [image(10), image(20), image(10, file_name="other.png")], "image"),
        ("annotations", [box(10, 10), box(2, 20), box(10, 20)], "annotation"),
        ("categories", [{"id": 10, "name": "a"}, {"id": 7, "name": "b"}, {"id": 10, "name": "c"}], "category"),
    ],
)
def test_a_repeated_id_is_named_with_both_places(refusal, key, records, kind):
    sentence = refusal(content(**{key: records}))
    assert f"{kind} 10 stands 2 times (records number 0 and 2); give every {kind} an id of its own" in sentence


@pytest.mark.parametrize("size", [(0, 30), (40, -1)])
def test_an_image_without_pixels_is_refused(refusal, size):
    sentence = refusal(content(images=[image(10), image(20, width=size[0], height=size[1])]))
    assert f"image 20 is {size[0]} x {size[1]} pixels; correct its width and height" in sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [], "annotations": []}, "0 images"),
        ({"annotations": []}, "2 images hold no box"),
        ({"annotations": [box(1, 10, iscrowd=1)]}, "1 annotations, of them 1 crowd"),
        ({"categories": [], "annotations": []}, "0 categories"),
    ],
)
def test_an_empty_split_is_refused(refusal, changes, said):
    sentence = refusal(content(**changes))
    assert said in sentence
    assert "empty split" in sentence or "categories" in changes


def test_an_image_without_boxes_has_an_empty_range(read):
    found = read(content(images=[image(10), image(15), image(20)]))
    assert found.image_ids.tolist() == [10, 15, 20]
    assert found.offsets.tolist() == [0, 1, 1, 2]


def test_ids_that_were_written_as_floats_are_integers(read):
    as_pandas_writes = {**box(1, 10), "image_id": 10.0, "category_id": 7.0}
    found = read(content(images=[image(20), image(10, width=40.0)], annotations=[as_pandas_writes]))
    assert found.offsets.tolist() == [0, 1, 1] and found.sizes.dtype == np.int64


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "b/../../a.png", "..\\a.png", "C:\\b\\a.png", "\\\\host\\a.png"]
)
def test_a_name_that_leads_out_of_the_images_folder_is_refused(refusal, name):
    sentence = refusal(content(images=[image(20), image(10, file_name=name)]))
    assert f'image 10 has "file_name" {name!r}, which is an absolute path or leads out' in sentence


@pytest.mark.parametrize("name", ["a/../b.png", "..a.png", "a..b/c.png", "a:b.png", "Ünï.png"])
def test_a_name_inside_the_images_folder_is_kept(read, name):
    assert read(content(images=[image(20), image(10, file_name=name)])).file_names == [name, "20.png"]


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "a\udcffb.png"])
def test_a_name_that_no_file_can_have_is_refused(refusal, name):
    sentence = refusal(content(images=[image(20), image(10, file_name=name)]))
    assert f'image 10 has "file_name" {name!r}, which holds a NUL or half a surrogate pair; rename' in sentence


def test_a_file_listed_twice_is_said(repair):
    found, said = repair(content(images=[image(20, file_name="a/b.png"), image(10, file_name="a\\b.png")]))
    assert len(found.image_ids) == 2
    assert "1 of 2 files listed more than once" in said and "as image 20 has" in said


def test_two_categories_of_one_name_are_said(repair):
    found, said = repair(content(categories=[{"id": 7, "name": "cat"}, {"id": 90, "name": "cat"}]))
    assert found.classes == ("cat", "cat")
    assert "1 of 2 categories of one name, each is a class of its own: category 90 has cat, as category 7 has" in said


def test_every_fault_is_found_at_once_and_the_sound_rest_is_read(tmp_path):
    spoilt = content(
        images=[image(20), image(10), image(30, width=0), image(40, file_name="../x"), 7, image(20), image("50")],
        categories=[{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 8}],
        annotations=[
            box(1, 20, 90),
            box(2, 99, 98, bbox=[1]),
            box(3, 30),
            box(4, 10, iscrowd=2),
            {"id": 5},
            box(6, 10, 8),
            box(7, 10, bbox=(1, 1, 0, 1)),
            box(1, 10),
        ],
    )
    found, problems = inspect_annotations(write_annotations(tmp_path / "a.json", spoilt))
    told = {problem.kind: list(problem.cases) for problem in problems}
    assert {kind: len(cases) for kind, cases in told.items()} == {
        "images that are no objects": 1,
        'images with a wrong "id"': 1,
        "a repeated image id": 1,
        "images without pixels": 1,
        "names outside the images folder": 1,
        "a repeated annotation id": 1,
        "categories without name": 1,
        "annotations without image_id": 1,
        "annotations without category_id": 1,
        "an unknown image": 1,
        "an unknown category": 1,
        "annotations without bbox": 1,
        'annotations with a wrong "bbox"': 1,
        'annotations with a wrong "iscrowd"': 1,
        "boxes without area": 1,
    }
    assert problems[-1].severity == "repair", "errors come first"
    assert (found.image_ids.tolist(), found.classes, found.truth.ids.tolist()) == ([10, 20], ("cat", "dog"), [1])
    with pytest.raises(InputError, match=r"`jdkd data check` lists all 15 problems, 14 of other kinds among them"):
        read_annotations(tmp_path / "a.json", strict=True)


def test_50_000_annotations_take_a_second_or_two(tmp_path):
    count, images = 50_000, 5_000
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 300, (count, 2)).tolist()
    sides = rng.uniform(1, 100, (count, 2)).tolist()
    owners, categories = rng.integers(0, images, count).tolist(), rng.integers(1, 81, count).tolist()
    large = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 81)],
        "annotations": [box(i, owners[i], categories[i], corners[i] + sides[i]) for i in range(count)],
    }
    file = write_annotations(tmp_path / "large.json", large)
    began = time.process_time()
    found = read_annotations(file)
    assert time.process_time() - began < 1.5
    assert len(found.boxes) == count and found.offsets[-1] == count
    place = int(rng.integers(images))
    mine = [i for i in range(count) if owners[i] == place]
    assert found.labels[found.offsets[place] : found.offsets[place + 1]].tolist() == [categories[i] for i in mine]
