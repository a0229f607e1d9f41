"""Masks out of polygons and run lengths, of the same objects as the boxes."""

import io
import json
import math
import pickle
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jdkd.data import CocoDetectionDataset, batches
from jdkd.data.checking import inspect_split
from jdkd.data.masks import decompressed
from jdkd.data.problems import refuse
from jdkd.errors import InputError
from jdkd.notices import Notice

from . import folders

HEIGHT, WIDTH = folders.HEIGHT, folders.WIDTH
TRIANGLE = [1, 2, 5, 2, 3, 7]


def square(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def lengths(pixels: np.ndarray, text: bool) -> dict:
    """Run lengths [H, W], as a list or as COCO's text."""
    if text:
        return {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(np.asfortranarray(pixels))["counts"].decode()}
    flat = pixels.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, flat.size]).tolist()}


def blob() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[2:6, 1:6], pixels[3, 2], pixels[15, 23] = 1, 0, 1
    return pixels


def write(folder, *segmentations, **changes):
    """Image 12 with its two boxes, image 11 with its one; these get segmentations, in this order."""

    def change(content):
        chosen = [record for record in content["annotations"] if not record.get("iscrowd")]
        for record, segmentation in zip(reversed(chosen), segmentations, strict=False):
            record["segmentation"] = segmentation
        for record in chosen:
            record.update(changes)

    return folders.write(folder, change)


def opened(folder, *segmentations, **changes):
    return CocoDetectionDataset(write(folder, *segmentations, **changes))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "segmentation",
    [
        [TRIANGLE],
        [[1.25, 2.5, 5.75, 2.1, 3.3, 7.9, 0.4, 4]],
        [TRIANGLE, square(8, 8, 12.5, 11)],
        [square(-9, -3, 4, 99)],
        [square(20, 10, 80, 12), TRIANGLE],
        lengths(blob(), text=False),
        lengths(blob(), text=True),
    ],
)
def test_masks_are_those_of_pycocotools(tmp_path, segmentation):
    dataset = opened(tmp_path, segmentation, [TRIANGLE], [TRIANGLE])
    masks = dataset.with_masks()[2][1]["masks"]
    assert masks.shape == (2, HEIGHT, WIDTH) and masks.dtype == torch.uint8 and masks.is_contiguous()
    with redirect_stdout(io.StringIO()):
        theirs = COCO(str(dataset.split.annotations))
    for mask, number in zip(masks, (120, 121), strict=True):
        assert np.array_equal(mask.numpy(), theirs.annToMask(theirs.anns[number]))
        assert mask.sum() > 3


def test_targets_have_masks_only_where_they_are_asked_for(tmp_path):
    dataset = opened(tmp_path, [TRIANGLE], [TRIANGLE], [TRIANGLE])
    masked = dataset.with_masks()
    assert "masks" not in dataset[2][1] and not dataset.masks and masked.masks
    assert masked[2][1].keys() - dataset[2][1].keys() == {"masks"}
    assert torch.equal(masked[2][1]["boxes"], dataset[2][1]["boxes"])
    assert masked[0][1]["masks"].shape == (0, HEIGHT, WIDTH), "an image without a box"


def test_masks_stay_with_their_boxes(tmp_path):
    def mix(content):
        for number, record in enumerate(content["annotations"]):
            x, y, width, height = record["bbox"] = [number, 2, 4, 5]
            record["segmentation"] = [square(x, y, x + width, y + height)]
        content["annotations"][0].update(bbox=[99, 2, 4, 5])  # outside, which is left out
        content["annotations"].reverse()

    with pytest.warns(Notice, match="outside their image, left out"):
        dataset = CocoDetectionDataset(folders.write(tmp_path, mix, images=5))
    for part in (dataset.with_masks(), dataset.subset([4, 2]).with_masks(), dataset.with_masks().subset([3, 4])):
        for _, target in part:
            for (left, top, right, bottom), mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
                assert mask[top:bottom, left:right].all() and mask.sum() == (right - left) * (bottom - top)
    assert sum(len(target["masks"]) for _, target in dataset.with_masks()) == 9


UNREADABLE = {
    "text": "polygon",
    "a number": 5,
    "true": True,
    "a flat list": TRIANGLE,
    "points": [[1, 2], [5, 2], [3, 7]],
    "nothing in a polygon": [[]],
    "a line": [[1, 2, 5, 2]],
    "an odd number": [[1, 2, 5, 2, 3, 7, 8]],
    "text in a polygon": [["1", "2", "5", "2", "3", "7"]],
    "truth in a polygon": [[True, False, True, True, False, True]],
    "ragged": [[1, 2, [5, 2], 3, 7]],
    "not finite": [[1, 2, math.inf, 2, 3, 7]],
    "not a number": [[1, 2, math.nan, 2, 3, 7]],
    "far away": [square(1, 2, 1e12, 7)],
    "one good, one bad": [TRIANGLE, "x"],
    "no run lengths": {},
    "no counts": {"size": [HEIGHT, WIDTH]},
    "no size": {"counts": [HEIGHT * WIDTH]},
    "turned": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
    "too few pixels": {"size": [HEIGHT, WIDTH], "counts": [3, 4]},
    "too many pixels": {"size": [HEIGHT, WIDTH], "counts": [3, 4, 9999]},
    "below zero": {"size": [HEIGHT, WIDTH], "counts": [-4, HEIGHT * WIDTH + 4]},
    "fractions of a pixel": {"size": [HEIGHT, WIDTH], "counts": [3.5, HEIGHT * WIDTH - 3.5]},
    "no text of COCO's": {"size": [HEIGHT, WIDTH], "counts": "\x00\ud800~"},
    "text that is cut off": {"size": [HEIGHT, WIDTH], "counts": "ooo"},
}
ELSEWHERE = {
    "outside the image": [square(99, 2, 103, 7)],
    "outside the box": [square(12, 2, 16, 7)],
    "fractions of the image": [square(0.05, 0.1, 0.2, 0.4)],
    "without a pixel": [[1, 2, 1, 2, 1, 2]],
    "no pixel in run lengths": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    "a run of none": {"size": [HEIGHT, WIDTH], "counts": [5 * HEIGHT, 0, (WIDTH - 5) * HEIGHT]},
}
MISSING = {"null": None, "empty": []}


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        *[pytest.param(given, "segmentations that cannot be read", id=name) for name, given in UNREADABLE.items()],
        *[pytest.param(given, "without a pixel in their box", id=name) for name, given in ELSEWHERE.items()],
        *[pytest.param(given, "boxes without a segmentation", id=name) for name, given in MISSING.items()],
    ],
)
def test_what_is_no_mask_of_the_box_is_the_whole_box_and_said(tmp_path, segmentation, kind):
    dataset = opened(tmp_path, segmentation, [TRIANGLE], [TRIANGLE], bbox=[2.5, 3, 4, 4.5])
    with pytest.warns(Notice, match=kind) as said:
        masks = dataset.with_masks()[2][1]["masks"]
    (sentence,) = [str(one.message) for one in said]
    assert "1 of 3 " in sentence and "taken for the whole box where masks are asked for: annotation 121 in" in sentence
    assert masks[1, 3:8, 2:7].all() and masks[1].sum() == 5 * 5, "every pixel that the box touches"
    assert 0 < masks[0].sum() < 20, "the others keep theirs"


def test_strict_refuses_what_is_put_right_of_masks_but_never_without_them(tmp_path):
    split = write(tmp_path, "rubbish", [TRIANGLE], [TRIANGLE])
    dataset = CocoDetectionDataset(type(split)(split.images, split.annotations, "val", strict=True))
    assert len(dataset[2][1]["boxes"]) == 2 and not dataset.known_as("another")
    with pytest.raises(InputError, match=r"annotation 121 .*'rubbish', neither polygons nor run lengths.*--strict"):
        dataset.with_masks()


@pytest.mark.parametrize(
    ("segmentation", "example"), [(None, ""), ([], ""), ("rubbish", r" that can be used \(annotation 110 .*'rubbish'")]
)
def test_data_without_any_segmentation_are_refused_where_masks_are_asked_for(tmp_path, segmentation, example):
    dataset = opened(tmp_path, segmentation, segmentation, segmentation)
    assert not dataset.segmented and len(dataset[2][1]["boxes"]) == 2
    said = rf"val2017\.json: none of its 3 boxes has a segmentation{example}.*; give annotations with segmentations"
    for data in (dataset, dataset.subset([0])):
        with pytest.raises(InputError, match=said):
            data.with_masks()


def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path):
    dataset = opened(tmp_path, [TRIANGLE])
    dataset.split.annotations.write_text(json.dumps({"annotations": []}))
    with pytest.raises(InputError, match=r"val2017\.json is no longer the file that was opened .*; open the data anew"):
        dataset.with_masks()


def test_the_file_is_read_once_for_all_that_show_it(tmp_path):
    dataset = opened(tmp_path, [TRIANGLE], [TRIANGLE], [TRIANGLE])
    masked = dataset.with_masks()
    dataset.split.annotations.unlink()
    assert torch.equal(dataset.subset([2]).with_masks()[0][1]["masks"], masked[2][1]["masks"])
    assert torch.equal(pickle.loads(pickle.dumps(masked))[2][1]["masks"], masked[2][1]["masks"])


def test_a_check_of_the_data_counts_masks_and_lists_what_is_wrong_with_them(tmp_path):
    found = inspect_split(write(tmp_path, "rubbish", [TRIANGLE], ELSEWHERE["outside the box"]), decode=True)
    assert found.summary == "3 images, 3 boxes (1 with masks), 2 classes: 2 repairs"
    assert [problem.kind for problem in found.problems] == [
        "segmentations that cannot be read",
        "segmentations without a pixel in their box",
    ]
    refuse([problem for problem in found.problems if problem.severity == "error"])
    without = inspect_split(write(tmp_path / "boxes"), decode=True)
    assert without.summary == "3 images, 3 boxes, 2 classes: nothing wrong"


def test_flips_mirror_masks_with_their_boxes(tmp_path):
    dataset = opened(tmp_path, [TRIANGLE], lengths(blob(), text=True), [TRIANGLE]).with_masks()
    ((_, targets),) = batches(dataset, batch_size=3, steps=1, seed=0)
    ((_, mirrored),) = batches(dataset, batch_size=3, steps=1, seed=0, flip=1.0)
    assert sum(len(target["masks"]) for target in targets) == 3
    for target, other in zip(targets, mirrored, strict=True):
        assert torch.equal(other["masks"], target["masks"].flip(-1))
        assert type(other["masks"]) is torch.Tensor


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_change_no_mask(tmp_path):
    dataset = opened(tmp_path, [TRIANGLE], lengths(blob(), text=True), [TRIANGLE]).with_masks()
    settings = {"batch_size": 4, "steps": 3, "seed": 5, "flip": 0.5}
    ours, theirs = (list(batches(dataset, workers=workers, **settings)) for workers in (0, 2))
    for (images, targets), (others, other_targets) in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, images, others))
        for target, other in zip(targets, other_targets, strict=True):
            assert all(torch.equal(target[key], other[key]) for key in ("boxes", "labels", "masks"))


def test_data_that_differ_in_masks_have_another_fingerprint_only_where_masks_are_asked_for(tmp_path):
    a = opened(tmp_path / "a", [TRIANGLE], [TRIANGLE], [TRIANGLE])
    b = opened(tmp_path / "b", [square(1, 2, 5, 7)], [TRIANGLE], [TRIANGLE])
    assert a.fingerprint == b.fingerprint
    assert len({a.fingerprint, a.with_masks().fingerprint, b.with_masks().fingerprint}) == 3


def test_perfect_masks_score_one_and_crowd_regions_are_ignored(tmp_path):
    crowd = lengths(np.ones((HEIGHT, WIDTH), dtype=np.uint8), text=False)

    def change(content):
        for record in content["annotations"]:
            record["segmentation"] = crowd if record.get("iscrowd") else [TRIANGLE]
            record["category_id"] = 3

    dataset = CocoDetectionDataset(folders.write(tmp_path, change))
    assert "segmentation" not in next(iter(dataset.coco.anns.values()))
    truth = dataset.with_masks().coco
    found = [
        {"image_id": one["image_id"], "category_id": 3, "segmentation": one["segmentation"], "score": 0.9}
        for one in truth.anns.values()
        if not one["iscrowd"]
    ]
    inside = coco_mask.encode(np.asfortranarray(blob()))
    found += [{"image_id": 10, "category_id": 3, "segmentation": inside, "score": 1.0}]  # in the crowd alone
    with redirect_stdout(io.StringIO()):
        scores = COCOeval(truth, truth.loadRes(found), "segm")
        scores.evaluate(), scores.accumulate(), scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0)


def test_a_file_may_have_more_masks_than_a_byte_can_count(tmp_path):
    def many(content):
        boxes = [{"id": k, "image_id": 12, "category_id": 3, "bbox": [k % 9, 2, 4, 5]} for k in range(1, 301)]
        content["annotations"] = [{**one, "segmentation": [square(one["bbox"][0], 2, 9, 7)]} for one in boxes]

    masks = CocoDetectionDataset(folders.write(tmp_path, many)).with_masks()[2][1]["masks"]
    assert masks.shape == (300, HEIGHT, WIDTH) and masks.flatten(1).any(1).all()


def test_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 40), (300, 200), (7, 5)):
        for share in (0.0, 0.01, 0.5, 1.0):
            pixels = np.asfortranarray(rng.random(size) < share, dtype=np.uint8)
            counts = decompressed(coco_mask.encode(pixels)["counts"])
            assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts), pixels.flatten(order="F"))
