"""GFL against its equations, in plain Python."""

import math

import pytest
import torch

from jdkd.detect.atss import adaptive_assignment
from jdkd.detect.gfl import distribution_focal_loss, paired_iou, quality_focal_loss
from tests.detect.places import drawn, drawn_boxes, giou_loss, iou, places, small


def quality_by_hand(logit, y):
    s = 1 / (1 + math.exp(-logit))
    return -(abs(y - s) ** 2) * ((1 - y) * math.log(1 - s) + y * math.log(s))


def distribution_by_hand(logits, y):
    total = sum(map(math.exp, logits))
    below = min(int(y), len(logits) - 2)
    lower, upper = (math.exp(logits[k]) / total for k in (below, below + 1))
    return -((below + 1 - y) * math.log(lower) + (y - below) * math.log(upper))


def test_the_quality_focal_loss_is_equation_5():
    logits = 3 * torch.randn(40, generator=drawn(0), dtype=torch.float64)
    quality = torch.rand(40, generator=drawn(1), dtype=torch.float64).round(decimals=1)
    quality[:3] = torch.tensor([0.0, 1.0, 0.5])
    expected = [quality_by_hand(s, y) for s, y in zip(logits.tolist(), quality.tolist(), strict=True)]
    assert quality_focal_loss(logits, quality).tolist() == pytest.approx(expected)
    fits = torch.tensor([0.3], dtype=torch.float64)
    assert quality_focal_loss(fits.logit(), fits).item() == pytest.approx(0, abs=1e-12)
    assert quality_focal_loss(torch.tensor([-90.0, 90.0]), torch.tensor([1.0, 0.0])).isfinite().all()


def test_the_distribution_focal_loss_is_equation_6():
    logits = torch.randn(20, 17, generator=drawn(2), dtype=torch.float64)
    distances = 16 * torch.rand(20, generator=drawn(3), dtype=torch.float64)
    distances[:4] = torch.tensor([0.0, 16.0, 15.0, 7.0])  # both ends, and whole numbers
    expected = [distribution_by_hand(row, y) for row, y in zip(logits.tolist(), distances.tolist(), strict=True)]
    assert distribution_focal_loss(logits, distances).tolist() == pytest.approx(expected)


def test_boxes_of_one_row_overlap_as_pairs_do():
    one, other = drawn_boxes(30, drawn(4)), drawn_boxes(30, drawn(5))
    expected = [iou(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert paired_iou(one, other).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    nothing = torch.ones(1, 4)
    assert paired_iou(nothing, nothing).tolist() == [0]


def test_a_box_is_the_mean_of_its_distributions():
    model = small("gfl")
    outputs = model.head([torch.rand(2, 16, 4, 4), torch.rand(2, 16, 2, 2)])
    assert outputs["bbox_distribution"].shape == (2, 20, 4, 17) and outputs["cls_logits"].shape == (2, 20, 3)
    shares = outputs["bbox_distribution"].softmax(-1)
    expected = sum(step * shares[..., step] for step in range(17)) / 8  # of an anchor's size
    torch.testing.assert_close(outputs["bbox_regression"], expected)
    maps = [torch.rand(2, 16, 4, 4)]
    row = model.head.regression_head.bbox_reg(model.head.regression_head.conv(maps[0]))  # [N, 68, H, W]
    assert torch.equal(model.head.regression_head(maps)[1, 6, 2], row[1, 34:51, 1, 2]), "the sides come one by one"


def test_losses_are_equation_8():
    model = small("gfl").double()
    anchors, per_level = places()
    shown = [2, 0, 3]  # objects of each image
    targets = [
        {"boxes": drawn_boxes(count, drawn(seed), 8, 44), "labels": torch.tensor([1, 2, 2])[:count]}
        for seed, count in enumerate(shown)
    ]
    head = {
        "cls_logits": torch.randn(3, len(anchors), 3, generator=drawn(7)).double(),
        "bbox_distribution": torch.randn(3, len(anchors), 4, 17, generator=drawn(8)).double(),
    }
    head["bbox_regression"] = (head["bbox_distribution"].softmax(-1) * torch.arange(17)).sum(-1) / 8
    losses = model.compute_loss(targets, head, [anchors.double()] * 3, per_level)
    quality_sum = box_sum = distribution_sum = weight_sum = 0.0
    positives = 0
    for n, target in enumerate(targets):
        matched = adaptive_assignment(anchors, per_level, target["boxes"]).tolist()
        for a, g in enumerate(matched):
            logits, y = head["cls_logits"][n, a].tolist(), [0.0] * 3
            if g >= 0:
                positives += 1
                box, anchor = target["boxes"][g].tolist(), anchors[a].tolist()
                x, y_, size = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, anchor[2] - anchor[0]
                left, top, right, bottom = (size * side for side in head["bbox_regression"][n, a].tolist())
                predicted = [x - left, y_ - top, x + right, y_ + bottom]
                y[target["labels"][g]] = iou(predicted, box)
                weight = max(1 / (1 + math.exp(-logit)) for logit in logits)
                sides = [x - box[0], y_ - box[1], box[2] - x, box[3] - y_]
                wanted = [min(16.0, max(0.0, 8 * side / size)) for side in sides]
                rows = head["bbox_distribution"][n, a].tolist()
                distribution_sum += weight * sum(map(distribution_by_hand, rows, wanted)) / 4
                box_sum += weight * giou_loss(predicted, box)
                weight_sum += weight
            quality_sum += sum(map(quality_by_hand, logits, y))
    assert positives > 5
    assert losses["classification"].item() == pytest.approx(quality_sum / positives, rel=1e-5)
    assert losses["bbox_regression"].item() == pytest.approx(2 * box_sum / weight_sum, rel=1e-5)
    assert losses["bbox_distribution"].item() == pytest.approx(0.25 * distribution_sum / weight_sum, rel=1e-5)


def test_what_a_score_is_to_be_and_what_a_box_weighs_teach_nothing():
    """The quality is a target and the score a weight: each loss trains its own branch alone."""
    model = small("gfl").train()
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64, generator=drawn(1))], [target])
    scores, boxes = model.head.classification_head, model.head.regression_head
    losses.pop("classification").backward(retain_graph=True)
    assert scores.cls_logits.bias.grad.any() and all(each.grad is None for each in boxes.parameters())
    scores.zero_grad()
    sum(losses.values()).backward()
    assert boxes.bbox_reg.bias.grad.any() and all(each.grad is None for each in scores.parameters())
