"""Resampled mAP: of every image once it is COCO's, and an image that is counted twice is as good as two."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from benchmarks.resampling import Judged, draws, interval
from jdkd.data import CocoDetectionDataset, resolve_splits, write_digit_scenes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_digit_scenes(folder, train=1, val=8, size=64, seed=0)
    return CocoDetectionDataset(resolve_splits(folder)[1])


def detections(dataset, images, seed=0):
    """Objects moved by chance, some of another class, and some where there is nothing."""
    rng, found = np.random.default_rng(seed), []
    for image, boxes in dataset.coco.imgToAnns.items():
        for box in boxes if image in images else ():
            for _ in range(2):
                category = box["category_id"] if rng.random() < 0.8 else 1
                moved = (np.array(box["bbox"]) + rng.normal(0, 2, 4)).clip(1).tolist()
                known = {"image_id": image, "category_id": category, "bbox": moved}
                found.append(known | {"score": round(float(rng.random()), 1)})  # some are equal
    return found


def coco_map(dataset, found, images):
    with contextlib.redirect_stdout(io.StringIO()):
        scoring = COCOeval(dataset.coco, dataset.coco.loadRes(found), "bbox")
        scoring.params.imgIds = sorted(images)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return scoring.stats[0]


def test_of_every_image_once_it_is_what_coco_says(dataset):
    ids = sorted(dataset.image_ids)
    found = detections(dataset, ids)
    judged = Judged(dataset, found)
    assert 0.05 < judged.map() == pytest.approx(coco_map(dataset, found, ids), abs=1e-12)
    some = np.array([place % 3 > 0 for place in range(len(ids))]).astype(int)
    chosen = [image for image, kept in zip(ids, some, strict=True) if kept]
    assert judged.map(some) == pytest.approx(coco_map(dataset, found, chosen), abs=1e-12)
    assert judged.map(3 * some) == pytest.approx(judged.map(some), abs=0.02), "ties are broken image by image"
    assert Judged(dataset, []).map() == 0 and judged.map(0 * some) == -1


def test_draws_are_with_replacement_and_an_interval_holds_its_share():
    drawn = draws(20, 500)
    assert drawn.shape == (500, 20) and (drawn.sum(axis=1) == 20).all() and (drawn == 0).any() and (drawn > 1).any()
    assert interval(range(101)) == pytest.approx((2.5, 97.5))
