"""What a COCO-format folder may hold, and what it is refused for."""

import io
import json
import pickle
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval

from jdkd.data import CocoDetectionDataset, Split, resolve_split, resolve_splits
from jdkd.errors import InputError
from jdkd.notices import Notice

from . import folders


def box(content, bbox):
    content["annotations"][0]["bbox"] = bbox


def test_labels_follow_the_order_of_category_ids(tmp_path):
    dataset = CocoDetectionDataset(folders.write(tmp_path))
    assert dataset.classes == ("three", "seven")
    assert dataset.label_to_category == [-1, 3, 7]
    assert [dataset[i][1]["labels"].tolist() for i in range(3)] == [[], [1], [1, 1]]


def test_images_come_in_order_of_id_with_boxes_as_corners(tmp_path):
    dataset = CocoDetectionDataset(folders.write(tmp_path))
    assert dataset.image_ids == [10, 11, 12] and len(dataset) == 3
    image, target = dataset[2]
    assert image.dtype == torch.uint8 and image.shape == (3, folders.HEIGHT, folders.WIDTH)
    assert image[:, -1, -1].tolist() == [2, 0, 2]
    assert target["image_id"] == 12 and isinstance(target["image_id"], int)
    assert target["boxes"].tolist() == [[1, 2, 5, 7], [2, 2, 6, 7]] and target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64


def test_the_order_of_annotations_in_the_file_does_not_matter(tmp_path):
    dataset = CocoDetectionDataset(folders.write(tmp_path, lambda c: c["annotations"].reverse()))
    assert [len(target["boxes"]) for _, target in dataset] == [0, 1, 2]
    assert sorted(dataset[2][1]["boxes"].tolist()) == [[1, 2, 5, 7], [2, 2, 6, 7]]


def test_an_image_without_boxes_is_kept_with_an_empty_target(tmp_path):
    def no_annotation_at_all(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 10]

    dataset = CocoDetectionDataset(folders.write(tmp_path, no_annotation_at_all))
    target = dataset[0][1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert 10 in dataset.coco.imgs


def test_crowd_regions_are_ground_truth_to_ignore_but_never_targets(tmp_path):
    dataset = CocoDetectionDataset(folders.write(tmp_path))
    assert all(2 not in target["labels"] for _, target in dataset)
    crowds = [a for a in dataset.coco.anns.values() if a["iscrowd"]]
    assert {a["id"] for a in crowds} == {900, 901, 902}


def test_opening_and_indexing_print_nothing(tmp_path, capsys):
    assert len(CocoDetectionDataset(folders.write(tmp_path)).coco.anns) == 6
    assert capsys.readouterr().out == ""


def perfect(coco):
    """COCO's twelve numbers of detections that are the ground truth itself."""
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in coco.anns.values()
        if not a["iscrowd"]
    ]
    with redirect_stdout(io.StringIO()):
        scores = COCOeval(coco, coco.loadRes(found), "bbox")
        scores.evaluate(), scores.accumulate(), scores.summarize()
    return scores.stats


@pytest.mark.parametrize("first_id", [-1, 0, 1])
def test_perfect_detections_score_one_whatever_the_annotation_ids(tmp_path, first_id):
    def number_from(content):  # pycocotools alone takes id 0 for "unmatched", and needs area and iscrowd
        for i, record in enumerate(content["annotations"]):
            record["id"] = first_id + i
            del record["area"]

    assert perfect(CocoDetectionDataset(folders.write(tmp_path, number_from)).coco)[0] == pytest.approx(1)


@pytest.mark.parametrize("area", [-1, 0, 1e11, float("nan"), "20", [20]])
def test_perfect_detections_score_one_whatever_the_areas(tmp_path, area):
    split = folders.write(tmp_path, lambda c: [record.update(area=area) for record in c["annotations"]])
    with pytest.warns(Notice, match="3 of 6 areas that cannot be, replaced by the area of the box"):
        dataset = CocoDetectionDataset(split)
    stats = perfect(dataset.coco)
    assert stats[0] == stats[3] == pytest.approx(1), "all are small"
    assert stats[4] == stats[5] == -1, "none is medium or large"


def test_boxes_that_were_cut_or_left_out_are_scored_as_they_are_trained(tmp_path):
    def spoil(content):
        for record, bbox in zip(content["annotations"], ([-9, 3, 99, 4], [5, 5, 0, 0], [99, 0, 5, 5]), strict=False):
            record.update(bbox=bbox)

    with pytest.warns(Notice) as said:
        dataset = CocoDetectionDataset(folders.write(tmp_path, spoil))
    assert len(said) == 3
    assert [a["bbox"] for a in dataset.coco.anns.values() if not a["iscrowd"]] == [[0, 3, folders.WIDTH, 4]]
    assert [len(target["boxes"]) for _, target in dataset] == [0, 1, 0]
    assert perfect(dataset.coco)[0] == pytest.approx(1)


@pytest.mark.parametrize("areas", [(None, None, None), (3, None, 7.5)])
def test_an_area_that_is_not_given_is_the_boxs(tmp_path, areas):
    def give(content):
        for record, area in zip(content["annotations"], areas, strict=False):
            record.update(area=area)

    found = [record["area"] for record in CocoDetectionDataset(folders.write(tmp_path, give)).coco.anns.values()]
    assert found == [20 if area is None else area for area in areas] + [50, 50, 50]


def test_a_subset_restricts_the_ground_truth_too(tmp_path):
    whole = CocoDetectionDataset(folders.write(tmp_path))
    subset = whole.subset([2, 0])
    assert subset.image_ids == [12, 10] and subset.classes == whole.classes
    assert set(subset.coco.imgs) == {10, 12} and set(whole.coco.imgs) == {10, 11, 12}
    assert {a["image_id"] for a in subset.coco.anns.values()} == {10, 12}
    assert torch.equal(subset[0][1]["boxes"], whole[2][1]["boxes"])
    assert subset.subset([1]).image_ids == [10]


@pytest.mark.parametrize(
    ("indices", "said"),
    [([], "at least one"), ([3], r"index 3 is outside 0\.\.2"), ([-1], "index -1 is outside"), ([1, 1], "repeated")],
)
def test_a_subset_of_nonsense_is_refused(tmp_path, indices, said):
    with pytest.raises(InputError, match=said):
        CocoDetectionDataset(folders.write(tmp_path)).subset(indices)


def test_a_pickled_dataset_leaves_the_ground_truth_behind_and_rebuilds_it(tmp_path):
    dataset = CocoDetectionDataset(folders.write(tmp_path))
    before = len(pickle.dumps(dataset))
    assert dataset.coco.imgs
    assert len(pickle.dumps(dataset)) == before
    assert set(pickle.loads(pickle.dumps(dataset)).coco.imgs) == {10, 11, 12}


def test_the_fingerprint_is_of_what_the_data_are_and_not_of_where_they_lie(tmp_path):
    def laid_out_otherwise(content):
        content["annotations"].reverse()
        content["images"].reverse()
        content["info"] = {"year": 2017}

    here, there = folders.write(tmp_path / "here"), folders.write(tmp_path / "there", laid_out_otherwise, name="train")
    dataset = CocoDetectionDataset(here)
    assert len(dataset.fingerprint) == 64
    assert CocoDetectionDataset(there).subset([0, 1]).fingerprint == dataset.subset([0, 1]).fingerprint
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint
    assert dataset.subset([0, 1, 2]).fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["annotations"][0]["bbox"].__setitem__(2, 4.5),
        lambda c: c["annotations"][0].update(category_id=7),
        lambda c: c["annotations"][0].update(image_id=12),
        lambda c: c["annotations"].pop(0),
        lambda c: c["images"][0].update(file_name="./2.png"),
        lambda c: c["categories"][0].update(name="sieben"),
    ],
)
def test_another_box_label_name_size_or_class_is_another_fingerprint(tmp_path, change):
    sound, changed = folders.write(tmp_path / "a"), folders.write(tmp_path / "b", change)
    assert CocoDetectionDataset(changed).fingerprint != CocoDetectionDataset(sound).fingerprint


def test_another_size_is_another_fingerprint(tmp_path):
    split = folders.write(tmp_path)
    before = CocoDetectionDataset(split).fingerprint
    split = folders.write(tmp_path, lambda c: c["images"][0].update(width=25))
    Image.new("RGB", (25, folders.HEIGHT)).save(split.images / "2.png")
    assert CocoDetectionDataset(split).fingerprint != before


def test_a_subset_has_a_fingerprint_of_its_own(tmp_path):
    dataset = CocoDetectionDataset(folders.write(tmp_path))
    found = [dataset.subset(rows).fingerprint for rows in ([0, 1, 2], [2, 1, 0], [0, 1], [2])]
    assert len(set(found)) == 4


def test_the_fingerprint_of_a_subset_is_of_its_own_boxes(tmp_path):
    def change(content):
        [row for row in content["annotations"] if row["image_id"] == 12 and not row.get("iscrowd")][-1]["bbox"][2] = 3.5

    sound, changed = (
        CocoDetectionDataset(folders.write(tmp_path / name, how))
        for name, how in (("a", lambda c: None), ("b", change))
    )
    assert sound.subset([2]).fingerprint != changed.subset([2]).fingerprint
    assert sound.subset([2, 1]).fingerprint != changed.subset([2, 1]).fingerprint
    assert sound.subset([1, 0]).fingerprint == changed.subset([1, 0]).fingerprint


@pytest.mark.parametrize(("info", "expected"), [({}, True), (None, True), ({"mirror_symmetric": False}, False)])
def test_the_file_says_whether_its_classes_may_be_mirrored(tmp_path, info, expected):
    assert CocoDetectionDataset(folders.write(tmp_path, lambda c: c.update(info=info))).mirror_symmetric is expected


REFUSED = {
    'annotation 110 has "bbox" [1, 2, 3], not': lambda c: box(c, [1, 2, 3]),
    "[1, 2, 3, 'x'], not a list of 4 finite numbers": lambda c: box(c, [1, 2, 3, "x"]),
    "[1, 2, nan, 4]": lambda c: box(c, [1, 2, float("nan"), 4]),
    "refers to image 99, which is not among the 3 images": lambda c: c["annotations"][0].update(image_id=99),
    "refers to category 5, which is not among the 2 categories": lambda c: c["annotations"][0].update(category_id=5),
    "image 12 stands 2 times": lambda c: c["images"][1].update(id=12),
    "category 7 stands 2 times": lambda c: c["categories"][1].update(id=7),
    "annotation 110 stands 2 times": lambda c: c["annotations"][1].update(id=110),
    "image number 1 has no": lambda c: c["images"][1].pop("id"),
    "image a has \"id\" 'a', not an integer": lambda c: c["images"][1].update(id="a"),
    "1.5, not an integer": lambda c: c["images"][1].update(id=1.5),
    'has no "bbox"; add it or remove the annotation': lambda c: c["annotations"][0].pop("bbox"),
    'has no "width"': lambda c: c["images"][0].pop("width"),
    "image 12 is 24 x 0 pixels": lambda c: c["images"][0].update(height=0),
    'image 12 has "file_name"': lambda c: c["images"][0].update(file_name=""),
    'category 7 has "name" None': lambda c: c["categories"][0].update(name=None),
    'has no "categories"': lambda c: c.pop("categories"),
    'has dict instead of a list as "images"': lambda c: c.update(images={}),
    '"annotations"[0] is 5': lambda c: c["annotations"].insert(0, 5),
    "is an empty split: it lists 0 images": lambda c: c.update(images=[], annotations=[]),
    "is an empty split: its 3 images hold no box to detect (0 annotations": lambda c: c.update(annotations=[]),
    "of them 3 crowd regions": lambda c: c.update(annotations=c["annotations"][3:]),
    "lists 0 categories": lambda c: c.update(categories=[], annotations=[]),
}


@pytest.mark.parametrize("said", REFUSED)
def test_unusable_annotations_are_refused_with_file_values_and_remedy(tmp_path, said):
    split = folders.write(tmp_path, REFUSED[said])
    with pytest.raises(InputError) as refusal:
        CocoDetectionDataset(split)
    message = str(refusal.value)
    assert said in message and str(split.annotations) in message
    assert ";" in message and "\n" not in message  # what is wrong; what to do


@pytest.mark.parametrize("text", ["", "{", "no json", '{"images": [', "\xff"])
def test_what_is_not_json_is_refused(tmp_path, text):
    split = folders.write(tmp_path)
    split.annotations.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not JSON"):
        CocoDetectionDataset(split)


def test_json_of_another_kind_is_refused(tmp_path):
    split = folders.write(tmp_path)
    split.annotations.write_text("[1]")
    with pytest.raises(InputError, match="holds a list, not an object"):
        CocoDetectionDataset(split)


def test_missing_images_are_found_on_opening(tmp_path):
    split = folders.write(tmp_path)
    (split.images / "1.png").unlink()
    with pytest.raises(InputError, match=r"val2017: image .*/1\.png is missing; .*--val-images"):
        CocoDetectionDataset(split)


def test_images_may_lie_in_folders_below(tmp_path):
    split = folders.write(tmp_path, lambda c: c["images"][0].update(file_name="deep/er/2.png"))
    with pytest.raises(InputError, match=r"deep/er/2\.png"):
        CocoDetectionDataset(split)
    (split.images / "deep/er").mkdir(parents=True)
    (split.images / "2.png").rename(split.images / "deep/er/2.png")
    assert CocoDetectionDataset(split)[2][0].shape == (3, folders.HEIGHT, folders.WIDTH)


def test_splits_lie_in_the_coco_layout_or_where_the_flags_say(tmp_path):
    train, val = folders.write(tmp_path, name="train"), folders.write(tmp_path, name="val")
    assert resolve_splits(tmp_path) == (train, val)
    other = folders.write(tmp_path / "other")
    mixed = resolve_splits(str(tmp_path), val_images=str(other.images), val_annotations=other.annotations)
    assert mixed == (train, other)
    assert resolve_split("val", None, other.images, other.annotations) == other
    assert resolve_split("val", tmp_path / "none", other.images, other.annotations) == other


def test_what_is_not_given_or_not_there_is_named_with_its_flag(tmp_path):
    train = folders.write(tmp_path, name="train")
    for arguments, said in [
        ({}, "neither --data nor --train-images and --train-annotations is given"),
        ({"train_images": train.images}, "neither --data nor --train-annotations is given"),
        ({"data": tmp_path / "none"}, "none does not exist; .*--train-images and --train-annotations"),
        ({"data": train.annotations}, "instances_train2017.json is a file; .*--train-images and --train-annotations"),
        ({"data": tmp_path}, "val2017.json does not exist .*there is .*instances_train2017.json.*--val-annotations"),
        ({"data": tmp_path, "val_annotations": train.annotations}, "val2017 does not exist; .*--val-images"),
    ]:
        with pytest.raises(InputError, match=said):
            resolve_splits(**arguments)


@pytest.mark.parametrize("file", ["train/_annotations.coco.json", "train.json", "annotations/train.json"])
def test_of_another_layout_the_annotation_file_is_found_and_the_flags_named(tmp_path, file):
    split, data = folders.write(tmp_path / "elsewhere"), tmp_path / "data"
    (data / file).parent.mkdir(parents=True)
    shutil.copy(split.annotations, data / file)
    with pytest.raises(InputError, match=rf"there is {data / file}\); .*--train-annotations.*--train-images"):
        resolve_splits(data)
    with pytest.raises(InputError, match=f"there is {data / file}"):
        resolve_splits(data, train_images=split.images, train_annotations=file)  # which is not looked for in data


def test_a_split_without_a_name_still_says_which_folder(tmp_path):
    split = folders.write(tmp_path)
    (split.images / "0.png").unlink()
    with pytest.raises(InputError, match="correct the images folder"):
        CocoDetectionDataset(Split(split.images, split.annotations))


def test_segmentations_are_not_kept_in_memory(tmp_path):
    split = folders.write(tmp_path)
    assert "segmentation" in json.dumps(json.loads(split.annotations.read_text()))
    assert not any("segmentation" in a for a in CocoDetectionDataset(split).coco.anns.values())
