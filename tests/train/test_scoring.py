"""faster-coco-eval, with pycocotools as the judge; what each class scores."""

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from jdkd.data import CocoDetectionDataset, Split
from jdkd.train.scoring import score
from jdkd.train.twelve import twelve

SIDE = 240
CLASSES = ("ant", "bee", "cow", "dodo")  # there is no dodo


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Six images of objects of every size, crowds among them, and one image without any."""
    folder = tmp_path_factory.mktemp("crowded")
    rng = np.random.default_rng(0)
    objects = []
    for place in range(60):
        width, height = rng.uniform(3, 1.5 ** rng.uniform(3, 12), 2).clip(3, SIDE - 2)
        x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
        corners = [x, y, x + width, y, x + width * rng.uniform(0.6, 1), y + height, x, y + height * rng.uniform(0.6, 1)]
        objects.append(
            {
                "id": place + 1,
                "image_id": int(rng.integers(1, 7)),
                "category_id": int(rng.choice([2, 5, 9])),
                "bbox": [x, y, width, height],
                "area": width * height * rng.uniform(0.5, 1),
                "iscrowd": int(place % 9 == 0),
                "segmentation": [corners],
            }
        )
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(1, 8)],
        "categories": [{"id": n, "name": name} for n, name in zip((2, 5, 9, 11), CLASSES, strict=True)],
        "annotations": objects,
    }
    for n in range(1, 8):
        Image.new("RGB", (SIDE, SIDE)).save(folder / f"{n}.png")
    (folder / "all.json").write_text(json.dumps(content))
    return CocoDetectionDataset(Split(folder, folder / "all.json"))


def guesses(data, seed, masks=False):
    """Detections near the truth and far from it, with ties, more than are scored, and none on some images."""
    rng = np.random.default_rng(seed)
    rows = []
    for truth in [*data.coco.anns.values()] * 3:
        if truth["image_id"] % 5 == seed % 5:
            continue
        x, y, width, height = np.array(truth["bbox"]) + rng.normal(0, 3, 4) * (rng.random() < 0.7)
        box = [float(x), float(y), max(1.0, float(width)), max(1.0, float(height))]
        category = truth["category_id"] if rng.random() < 0.8 else int(rng.choice([2, 5, 9, 11]))
        rows.append({"image_id": truth["image_id"], "category_id": category, "bbox": box})
        rows[-1]["score"] = float(rng.integers(1, 12)) / 12
        if masks:
            del rows[-1]["bbox"]
            left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
            corners = [left, top, right, top, right, bottom, left, bottom]
            rows[-1]["segmentation"] = mask.frPyObjects([corners], SIDE, SIDE)[0]
    return rows


def judged(data, rows, most, of):
    """What pycocotools makes of them."""
    with redirect_stdout(StringIO()):
        scoring = COCOeval(data.coco, data.coco.loadRes([dict(row) for row in rows]), of)
        scoring.params.maxDets = [1, 10, most]
        scoring.evaluate(), scoring.accumulate()
    return scoring


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [100, 12])
@pytest.mark.parametrize("of", ["bbox", "segm"])
def test_all_numbers_are_those_of_pycocotools(crowded, of, most, seed):
    data = crowded.with_masks() if of == "segm" else crowded
    rows = guesses(data, seed, masks=of == "segm")
    judge, scores = judged(data, rows, most, of), score(data, rows, most, of)
    stats, lines = twelve(judge)
    assert scores.stats == pytest.approx(stats, abs=1e-12) and 0.05 < scores.map < 0.95
    assert scores.lines == lines
    for place, each in enumerate(scores.per_class):
        precision = judge.eval["precision"][..., place, 0, 2]  # [T, R]
        expected = [part.mean() for part in (precision, precision[0], precision[5])]
        assert [each.map, each.map50, each.map75] == pytest.approx(expected, abs=1e-12), each


def test_a_class_without_objects_has_no_score_and_crowds_are_no_objects(crowded):
    per_class = score(crowded, guesses(crowded, 0), 100).per_class
    assert [each.name for each in per_class] == list(CLASSES)
    dodo = per_class[-1]
    assert (dodo.objects, dodo.map, dodo.map50) == (0, -1, -1)
    singles = [truth for truth in crowded.coco.anns.values() if not truth["iscrowd"]]
    assert sum(each.objects for each in per_class) == len(singles) == 53


def test_the_table_has_a_line_a_class(crowded):
    table = score(crowded, guesses(crowded, 0), 100).table.splitlines()
    assert table[0].split() == ["class", "objects", "mAP", "mAP50", "mAP75"]
    assert [line.split()[0] for line in table[1:]] == list(CLASSES)
    assert table[-1].split() == ["dodo", "0", "-", "-", "-"]


def test_a_part_of_the_data_has_the_objects_of_its_images(crowded):
    part = crowded.subset([6, 0])
    per_class = score(part, [], 100).per_class
    assert sum(each.objects for each in per_class) == len(crowded[0][1]["labels"]) > 0
