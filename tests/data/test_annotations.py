"""Annotation files, sound and spoilt one thing at a time, without any image."""

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdkd.data.annotations import inspect_annotations, read_annotations
from jdkd.data.boxes import ROUNDING
from jdkd.errors import InputError
from jdkd.notices import Notice

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
        assert sentence.startswith(f"{tmp_path / 'instances.json'}: "), "the sentence names the file"
        assert "\n" not in sentence and "; " in sentence, "one sentence, with a remedy after the semicolon"
        return sentence

    return of


@pytest.fixture
def repair(tmp_path):
    """What is read from what it is given, and the one sentence that says what was put right."""

    def of(what):
        file = write_annotations(tmp_path / "instances.json", what)
        with pytest.warns(Notice) as said:
            found = read_annotations(file)
        (notice,) = said
        with pytest.raises(InputError, match="; --strict refuses that: correct the file"):
            read_annotations(file, strict=True)
        assert str(notice.message).startswith(f"{file}: ")
        return found, str(notice.message)

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


@pytest.mark.parametrize("value", [-1, 0, 1e11, 100, math.nan, math.inf, -math.inf, 10**400, "80", [80], True])
def test_an_area_that_cannot_be_is_the_boxs_and_said(repair, value):
    found, said = repair(only(box(1, 10, area=70), box(2, 20, area=value)))
    assert found.truth.areas.tolist() == [70, 80]
    assert "1 of 2 areas that cannot be, replaced by the area of the box: annotation 2 has area" in said
    assert f"{value!r}, its box 10 x 8 px" in said


@pytest.mark.parametrize("value", [0.5, 40, 80, 99])  # of a segmentation, of the box, of all pixels it touches
def test_an_area_that_can_be_is_kept(read, value):
    assert read(only(box(1, 10, area=value))).truth.areas.tolist() == [value]


def test_a_cut_box_has_no_larger_area_than_what_is_left(repair):
    found, said = repair(only(box(1, 10, bbox=(35, 0, 10, 10), area=100), box(2, 20, bbox=(35, 0, 10, 10), area=30)))
    assert found.truth.areas.tolist() == [50, 30] and "areas" not in said


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


@pytest.mark.parametrize("bbox", [(5, 6, 0, 8), (5, 6, 10, 0), (5, 6, -3, 8), (5, 6, 10, -0.5), (30.0, 6, 1e-7, 8)])
def test_a_box_without_area_is_left_out_and_said(repair, bbox):
    found, said = repair(only(*(box(i, 20, bbox=bbox) for i in range(2, 7)), box(1, 10)))
    assert found.offsets.tolist() == [0, 1, 1] and found.truth.ids.tolist() == [1]
    assert "5 of 6 boxes without area, left out, for example: annotation 2 [" in said
    assert said.count("annotation") == 3 and f"[{', '.join(f'{number:g}' for number in bbox)}] in 20.png" in said
    assert said.count(f"of {WIDTH} x {HEIGHT} px") == 3


@pytest.mark.parametrize("bbox", [(41, 6, 1, 8), (5, -1, 10, 1), (1000, 1000, 10, 10), (-10, 0, 10, 5), (40, 0, 9, 9)])
def test_a_box_outside_its_image_is_left_out_and_said(repair, bbox):
    found, said = repair(only(box(1, 10), box(2, 20, bbox=bbox)))
    assert found.offsets.tolist() == [0, 1, 1] and found.truth.ids.tolist() == [1]
    shown = ", ".join(f"{number:g}" for number in bbox)
    assert f"1 of 2 boxes outside their image, left out: annotation 2 [{shown}] in 20.png of 40 x 30 px" in said


@pytest.mark.parametrize(
    ("bbox", "left"),
    [
        ((-2.5, 6, 10, 8), [0, 6, 7.5, 14]),
        ((5, -3, 10, 8), [5, 0, 15, 5]),
        ((31, 6, 10, 8), [31, 6, 40, 14]),
        ((5, 25, 10, 1e9), [5, 25, 15, 30]),
        ((-500, -500, 1000, 1000), [0, 0, 40, 30]),
    ],
)
def test_a_box_over_the_edge_is_cut_and_said(repair, bbox, left):
    found, said = repair(only(box(1, 10), box(2, 20, bbox=bbox)))
    assert found.boxes[1].tolist() == left
    assert found.truth.boxes[1].tolist() == [*left[:2], left[2] - left[0], left[3] - left[1]]
    assert "1 of 2 boxes over the edge of their image, clipped: annotation 2 [" in said and "20.png" in said


def test_boxes_that_look_like_two_corners_are_cut_with_a_word_on_it(repair):
    corners = [box(i, 10, bbox=(20 + i, 15, 39, 29)) for i in (1, 2)]
    assert "though all of them fit as [left, top, right, bottom]" in repair(only(*corners))[1]


def test_each_kind_of_repair_is_said_for_itself(tmp_path):
    kinds = [(5, 6, 0, 8), (50, 6, 3, 8), (35, 6, 10, 8)]
    file = write_annotations(tmp_path / "a.json", only(box(9, 10), *(box(i, 10, bbox=b) for i, b in enumerate(kinds))))
    with pytest.warns(Notice) as said:
        read_annotations(file)
    assert len(said) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_annotations(file)  # once a file


@pytest.mark.parametrize("over", [0, 0.01, ROUNDING])
def test_an_overhang_of_rounding_is_cut_without_a_word(read, over):
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
    assert found.truth.ids.tolist() == [1, 3, 2] and found.truth.crowd.tolist() == [False, True, False]
    assert found.truth.boxes[1].tolist() == [-50, 0, 500, 0]


def test_an_image_without_boxes_has_an_empty_range(read):
    found = read(content(images=[image(10), image(15), image(20)]))
    assert found.image_ids.tolist() == [10, 15, 20]
    assert found.offsets.tolist() == [0, 1, 1, 2]


def test_ids_that_were_written_as_floats_are_integers(read):
    as_pandas_writes = {**box(1, 10), "image_id": 10.0, "category_id": 7.0}
    found = read(content(images=[image(20), image(10, width=40.0)], annotations=[as_pandas_writes]))
    assert found.offsets.tolist() == [0, 1, 1] and found.sizes.dtype == np.int64


def test_a_file_of_left_out_boxes_alone_is_an_empty_split(refusal):
    assert "0 crowd regions and 2 boxes without area or outside" in refusal(
        only(*(box(i, 10, bbox=(5, 6, 0, 8)) for i in (1, 2)))
    )


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
