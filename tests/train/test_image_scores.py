"""How a detector does image by image."""

import json
import math

import pytest
import torch

from jdkd.data.coco import CocoDetectionDataset
from jdkd.train.image_scores import (
    IGNORED,
    WRONG,
    JudgedImage,
    best_threshold,
    f1,
    judge,
    judged_images,
    worst_first,
)

TRUTH = {
    "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]]),
    "labels": torch.tensor([1, 2, 1]),
}


def _found(*rows):
    """Boxes, labels and scores of (corners, label, score)."""
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(labels).long(),
        torch.tensor(scores, dtype=torch.float64),
    )


def _image(scores, hits, truths):
    count = len(scores)
    return JudgedImage(torch.zeros(count, 4), torch.ones(count).long(), torch.tensor(scores), tuple(hits), truths)


def test_each_true_box_is_found_once_by_the_most_confident_detection_of_its_class():
    found = _found(
        ([0, 0, 10, 9], 1, 0.5),  # the first box again, which is taken
        ([0, 0, 10, 10], 1, 0.9),
        ([20, 20, 30, 30], 1, 0.8),  # another class
        ([20, 20, 30, 25], 2, 0.7),  # just half of it
        ([40, 0, 50, 4.9], 1, 0.6),  # less
    )
    judged = judge(*found, TRUTH)
    assert judged.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert judged.hits == (0, WRONG, 1, WRONG, WRONG)
    assert judged.counts(0.0) == (2, 1, 3) and judged.counts(0.7) == (2, 1, 1) and judged.counts(0.95) == (0, 3, 0)
    assert judged.f1(0.7) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_what_lies_in_a_crowd_of_its_class_does_not_count():
    crowd = torch.tensor([[60.0, 60, 100, 100]]), torch.tensor([1])
    rows = ([62, 62, 70, 70], 1, 0.9), ([62, 62, 70, 70], 2, 0.8), ([50, 60, 69, 70], 1, 0.7), ([0, 0, 10, 10], 1, 0.6)
    judged = judge(*_found(*rows), TRUTH, crowd)
    assert judged.hits == (IGNORED, WRONG, WRONG, 0)  # the third lies in it by less than half
    assert judged.counts(0.0) == (1, 2, 2)


@pytest.mark.parametrize(("counts", "score"), [((0, 0, 0), 1.0), ((0, 0, 3), 0.0), ((0, 3, 0), 0.0), ((1, 1, 1), 0.5)])
def test_an_image_with_nothing_on_it_is_right_where_nothing_is_found(counts, score):
    assert f1(*counts) == score
    truth = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    assert judge(*_found(), truth).f1(0.3) == 1.0 and judge(*_found(([0, 0, 1, 1], 1, 0.4)), truth).f1(0.3) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_one_of_the_best_f1_over_all_images(seed):
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(4):
        truths = int(torch.randint(1, 6, (), generator=generator))
        scores = (torch.rand(8, generator=generator) * 8).round().div(8).sort(descending=True).values  # some are equal
        right = torch.rand(8, generator=generator) < scores
        left = iter(range(truths))
        hits = [
            next(left, WRONG) if good else IGNORED if score == 0.5 else WRONG
            for good, score in zip(right, scores, strict=True)
        ]
        images.append(_image(scores.tolist(), hits, truths))
    threshold = best_threshold(images)

    def total(score):
        return f1(*(sum(counts) for counts in zip(*(one.counts(score) for one in images), strict=True)))

    assert total(threshold) == pytest.approx(max(total(k / 8) for k in range(9)))
    assert best_threshold([_image([0.9], [WRONG], 1)]) == 0.5 and best_threshold([_image([], [], 2)]) == 0.5


def test_the_worst_image_comes_first_and_of_equals_that_with_more_errors():
    images = [
        _image([0.9], [0], 1),
        _image([0.9], [WRONG], 1),
        _image([0.9, 0.8, 0.2], [WRONG] * 3, 2),  # the last one is below the threshold
        _image([0.9], [0], 2),
        _image([], [], 0),
        _image([0.9], [WRONG], 1),
    ]
    assert worst_first(images, 0.5) == [2, 1, 5, 3, 0, 4]


def test_a_detector_is_judged_on_every_image_crowds_included(scenes, tmp_path):
    content = json.loads(scenes.split.annotations.read_text())
    content["annotations"].append(
        {"id": 999, "image_id": 100, "category_id": 7, "bbox": [0, 0, 64, 64], "area": 4096, "iscrowd": 1}
    )
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    split = scenes.split.__class__(scenes.split.images, tmp_path / "annotations.json")
    dataset, done = CocoDetectionDataset(split), []
    model = Everywhere()
    images = judged_images(model, dataset, device="cpu", batch_size=5, progress=lambda *state: done.append(state))
    assert done == [(5, 12), (10, 12), (12, 12)] and [one.truths for one in images] == [
        len(target["labels"]) for _, target in dataset
    ]
    assert images[0].hits == (IGNORED,) and {one.hits for one in images[1:]} == {(WRONG,)}
    assert images[0].labels.tolist() == [2] and math.isclose(images[0].scores.item(), 0.25)
    assert model.training  # as it was


class Everywhere(torch.nn.Module):
    """Finds the second class in a corner of every image."""

    def forward(self, images):
        boxes = torch.tensor([[60.0, 60.0, 64.0, 64.0]])
        return [{"boxes": boxes, "labels": torch.tensor([2]), "scores": torch.tensor([0.25])} for _ in images]
