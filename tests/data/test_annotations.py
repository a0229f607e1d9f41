"""Annotation files, sound and spoilt one thing at a time, without any image."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdkd.data.annotations import OVERHANG, PUBLISHED_SLIPS, read_annotations
from jdkd.errors import InputError

WIDTH, HEIGHT = 40, 30


def image(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT, **changes}


def box(number: int, image_id: int, category_id: int = 7, bbox: Any = (5, 6, 10, 8), **changes: Any) -> dict[str, Any]:
    bbox = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **changes}


def content(**changes: Any) -> dict[str, Any]:
    """A sound annotation file: images 20 and 10, categories 90 ("dog") and 7 ("cat"), a box on each image."""
    sound = {
        "images": [image(20), image(10)],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [box(1, 20, 90), box(2, 10, 7, (1.5, 2.5, 3, 4))],
    }
    return {**sound, **changes}


def only(*annotations: dict[str, Any]) -> dict[str, Any]:
    return content(annotations=list(annotations))


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def write_annotations(file: Path, what: Any) -> Path:
    """Writes text as it is and anything else as JSON."""
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    return file


@pytest.fixture
def read(tmp_path):
    """Writes what it is given as an annotation file, and reads that."""
    return lambda what: read_annotations(write_annotations(tmp_path / "instances.json", what))


@pytest.fixture
def refusal(tmp_path, read):
    """The one sentence with which reading what it is given is refused."""

    def of(what):
        with pytest.raises(InputError) as caught:
            read(what)
        sentence = str(caught.value)
        assert str(tmp_path / "instances.json") in sentence, "the sentence names the file"
        assert "\n" not in sentence and "; " in sentence, "one sentence, with a remedy after the semicolon"
        return sentence

    return of


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
    small, large = image(20, width=16, height=12), image(10, width=640, height=480)
    found = read(content(images=[small, large], annotations=[box(1, 10, bbox=(600, 400, 41, 80)), box(2, 20)]))
    assert found.sizes.tolist() == [[640, 480], [16, 12]]
    assert found.boxes.tolist() == [[600, 400, 640, 480], [5, 6, 15, 12]]


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
    with pytest.raises(InputError, match=r"instances\.json is not JSON"):
        read_annotations(file)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content()), encoding="utf-8-sig")
    assert len(read_annotations(file).boxes) == 2


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(InputError, match=r"cannot read .*give a COCO annotation file") as caught:
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
    sentence = refusal(content(**{key: records}))
    assert sentence.startswith(f"{named} of ") and f'has no "{field}"' in sentence


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
    assert f'"{field}" of ' in sentence and repr(value) in sentence


def test_big_and_negative_ids_side_by_side_are_refused_not_confused(refusal):
    assert str(2**63) in refusal(content(images=[image(-1), image(2**63)]))
    assert str(2**63) in refusal(content(images=[image(2**63), image(2**63 + 1)]))


@pytest.mark.parametrize("value", [None, "", 5, ["a.png"]])
@pytest.mark.parametrize(("key", "field"), [("images", "file_name"), ("categories", "name")])
def test_what_must_be_a_name_and_is_none_is_shown(refusal, key, field, value):
    records = content()[key]
    records[0][field] = value
    sentence = refusal(content(**{key: records}))
    assert f'"{field}" of' in sentence and repr(value) in sentence and str(records[0]["id"]) in sentence


@pytest.mark.parametrize(
    "value",
    [None, 7, "5 6 10 8", [], [5, 6, 10], [5, 6, 10, 8, 1], ["5", "6", "10", "8"], [5, 6, None, 8], [[5, 6, 10, 8]]],
)
def test_a_box_that_is_not_four_numbers_is_shown(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, bbox=value)))
    assert '"bbox" of annotation 2' in sentence and repr(value) in sentence and "4 finite numbers" in sentence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_box_with_nan_or_infinity_is_refused(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, bbox=(5, 6, value, 8))))
    assert '"bbox" of annotation 2' in sentence and "finite" in sentence


@pytest.mark.parametrize("value", ["0", "1", 2, -1, None, 0.5, [], math.nan])
def test_iscrowd_is_0_or_1(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, iscrowd=value)))
    assert '"iscrowd" of annotation 2' in sentence and f"is {value!r}, not 0 or 1" in sentence


@pytest.mark.parametrize("value", ["80", [80], math.nan])
def test_an_area_that_is_no_number_is_refused(refusal, value):
    sentence = refusal(only(box(1, 10), box(2, 20, area=value)))
    assert '"area" of annotation 2' in sentence and repr(value) in sentence


def test_an_unknown_image_is_named(refusal):
    sentence = refusal(only(box(1, 10), box(2, 555), box(3, 556)))
    assert "annotation 2 " in sentence and "image 555" in sentence and "its 2 images" in sentence
    assert "1 more such annotation;" in sentence


@pytest.mark.parametrize("category", [0, 8, 91])
def test_an_unknown_category_is_named(refusal, category):
    sentence = refusal(only(box(1, 10), box(2, 20, category)))
    assert "annotation 2 " in sentence and f"category {category}," in sentence and "its 2 categories" in sentence


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
    assert f"{kind} id 10 stands 2 times" in sentence and "number 0 and 2" in sentence


@pytest.mark.parametrize("size", [(0, 30), (40, -1)])
def test_an_image_without_pixels_is_refused(refusal, size):
    sentence = refusal(content(images=[image(10), image(20, width=size[0], height=size[1])]))
    assert "image 20 " in sentence and f"{size[0]} x {size[1]} pixels" in sentence


@pytest.mark.parametrize("bbox", [(5, 6, 0, 8), (5, 6, 10, 0), (5, 6, -3, 8), (5, 6, 10, -0.5), (30.0, 6, 1e-7, 8)])
def test_a_box_without_area_is_refused(refusal, bbox):
    sentence = refusal(only(box(1, 10), box(2, 20, bbox=bbox), box(3, 20, bbox=bbox)))
    assert "annotation 2 " in sentence and "zero or negative area" in sentence and "image 20" in sentence
    assert ", ".join(f"{number:g}" for number in bbox[:2]) in sentence and f"{WIDTH} x {HEIGHT}" in sentence
    assert "and 1 more such box;" in sentence


@pytest.mark.parametrize(
    "bbox",
    [
        (-2.5, 6, 10, 8),
        (5, -3, 10, 8),
        (31, 6, 11.5, 8),
        (5, 25, 10, 8),
        (41, 6, 1, 8),  # within the overhang, but nothing of it is inside
        (5, -1, 10, 1),
        (1000, 1000, 10, 10),
    ],
)
def test_a_box_outside_its_image_is_refused(refusal, bbox):
    sentence = refusal(only(box(1, 10), box(2, 20, bbox=bbox)))
    assert "annotation 2 " in sentence and "outside its image" in sentence and "image 20 of 40 x 30 px" in sentence
    assert f"[{', '.join(f'{number:g}' for number in bbox)}]" in sentence


@pytest.mark.parametrize("over", [0, 0.4, 1, OVERHANG])
def test_an_overhang_of_rounding_is_cut_to_the_image(read, over):
    found = read(only(box(1, 10, bbox=(-over, -over, WIDTH + 2 * over, HEIGHT + 2 * over))))
    assert found.boxes.tolist() == [[0, 0, WIDTH, HEIGHT]]


def test_a_box_inside_is_not_touched(read):
    found = read(only(box(1, 10, bbox=(0.25, 0.5, 39.75, 29.5)), box(2, 20, bbox=(39.5, 29.5, 0.5, 0.5))))
    assert found.boxes.tolist() == [[0.25, 0.5, 40, 30], [39.5, 29.5, 40, 30]]


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


def test_crowd_regions_are_no_targets_and_may_lie_anywhere(read):
    crowd = box(3, 10, bbox=(-50, 0, 500, 0), iscrowd=1)
    found = read(only(box(1, 20), crowd, box(2, 10, iscrowd=0)))
    assert found.offsets.tolist() == [0, 1, 2]
    assert [record["id"] for record in found.raw["annotations"]] == [1, 3, 2]


def test_an_image_without_boxes_has_an_empty_range(read):
    found = read(content(images=[image(10), image(15), image(20)]))
    assert found.image_ids.tolist() == [10, 15, 20]
    assert found.offsets.tolist() == [0, 1, 1, 2]


def test_the_two_flat_boxes_of_published_coco_are_left_out_and_no_others(read, refusal):
    (number, image_id), _ = PUBLISHED_SLIPS
    flat, sound = box(number, image_id, bbox=(5, 6, 10, 0)), box(2, 10)
    images = [image(10), image(image_id)]
    found = read(content(images=images, annotations=[flat, sound]))
    assert found.offsets.tolist() == [0, 1, 1]
    elsewhere = refusal(content(images=images, annotations=[{**flat, "image_id": 10}, sound]))
    assert f"annotation {number} " in elsewhere
    found = read(content(images=images, annotations=[{**flat, "bbox": [5, 6, 10, 3]}, sound]))
    assert found.offsets.tolist() == [0, 1, 2], "a box with area is kept, whatever its ids"


def test_segmentations_are_dropped(read):
    found = read(only(box(1, 10, segmentation=[[1, 2, 3, 4, 5, 6]])))
    assert "segmentation" not in found.raw["annotations"][0]


def test_200_000_annotations_take_a_few_seconds(tmp_path):
    count, images = 200_000, 20_000
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
    assert time.process_time() - began < 6
    assert len(found.boxes) == count and found.offsets[-1] == count
    place = int(rng.integers(images))
    mine = [i for i in range(count) if owners[i] == place]
    assert found.labels[found.offsets[place] : found.offsets[place + 1]].tolist() == [categories[i] for i in mine]
