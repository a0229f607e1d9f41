"""ATSS against its algorithm, anchor by anchor in plain Python."""

import math
import statistics

import pytest
import torch

from jdkd.detect.atss import adaptive_assignment
from tests.detect.places import drawn, drawn_boxes, giou_loss, iou, places, small


def by_hand(anchors, per_level, boxes, candidates=9):
    """Algorithm 1 of Zhang et al., CVPR 2020."""
    best = [(-1.0, -1)] * len(anchors)
    centers = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in anchors]
    for g, box in enumerate(boxes):
        middle, chosen, first = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), [], 0
        for count in per_level:
            level = sorted(range(first, first + count), key=lambda a: math.dist(centers[a], middle))
            chosen, first = chosen + level[:candidates], first + count
        overlaps = [iou(anchors[a], box) for a in chosen]
        least = statistics.mean(overlaps) + (statistics.stdev(overlaps) if len(chosen) > 1 else 0.0)
        for a, overlap in zip(chosen, overlaps, strict=True):
            (x, y), (x0, y0, x1, y1) = centers[a], box
            if overlap >= least and x0 < x < x1 and y0 < y < y1 and overlap > best[a][0]:
                best[a] = (overlap, g)
    return [g for _, g in best]


@pytest.mark.parametrize("sizes", [(2, 50), (1, 4), (60, 90), (20, 22)], ids=["mixed", "tiny", "huge", "alike"])
def test_positives_are_those_of_the_papers_algorithm(sizes):
    anchors, per_level = places()
    found = 0
    for seed in range(4):
        boxes = drawn_boxes(1 + 4 * seed, drawn(seed), *sizes)  # up to 13, which overlap
        matched = adaptive_assignment(anchors, per_level, boxes).tolist()
        assert matched == by_hand(anchors.tolist(), per_level, boxes.tolist())
        found += sum(which >= 0 for which in matched)
    assert found or sizes == (1, 4)


def test_without_objects_all_is_background_and_an_object_has_what_anchors_there_are():
    anchors, per_level = places()
    assert adaptive_assignment(anchors, per_level, torch.zeros(0, 4)).unique().tolist() == [-1]
    alone = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    assert adaptive_assignment(alone, [1], torch.tensor([[4.0, 4.0, 22.0, 22.0]])).tolist() == [0]


def test_losses_are_those_of_plain_formulas():
    """Focal loss, GIoU and centre-ness (Tian et al., ICCV 2019, equations 2 and 3), over the number of positives."""
    model = small("atss").double()
    anchors, per_level = places()
    boxes, labels = drawn_boxes(5, drawn(1), 10, 40), torch.tensor([1, 2, 1, 2, 2])
    matched = adaptive_assignment(anchors, per_level, boxes)
    outputs = {
        "cls_logits": torch.randn(2, len(anchors), 3, generator=drawn(2)).double(),
        "bbox_regression": torch.rand(2, len(anchors), 4, generator=drawn(3)).double(),
        "bbox_ctrness": torch.randn(2, len(anchors), 1, generator=drawn(4)).double(),
    }
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    targets = [{"boxes": boxes, "labels": labels}, none]
    losses = model.compute_loss(targets, outputs, [anchors.double()] * 2, per_level)
    expected, positives = dict.fromkeys(losses, 0.0), int((matched >= 0).sum())
    for n in range(2):
        for a, anchor in enumerate(anchors.tolist()):
            g = matched[a].item() if n == 0 else -1
            for k, logit in enumerate(outputs["cls_logits"][n, a].tolist()):
                p, positive = 1 / (1 + math.exp(-logit)), g >= 0 and labels[g] == k
                expected["classification"] -= (
                    0.25 * (1 - p) ** 2 * math.log(p) if positive else 0.75 * p**2 * math.log(1 - p)
                )
            if g < 0:
                continue
            x, y, size = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, anchor[2] - anchor[0]
            box = boxes[g].tolist()
            left, top, right, bottom = (size * side for side in outputs["bbox_regression"][n, a].tolist())
            expected["bbox_regression"] += giou_loss([x - left, y - top, x + right, y + bottom], box)
            across, down = (x - box[0], box[2] - x), (y - box[1], box[3] - y)
            centered = math.sqrt(min(across) / max(across) * min(down) / max(down))
            p = 1 / (1 + math.exp(-outputs["bbox_ctrness"][n, a].item()))
            expected["bbox_ctrness"] -= centered * math.log(p) + (1 - centered) * math.log(1 - p)
    assert positives > 5
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name] / positives, rel=1e-5), name


def test_a_box_is_at_first_the_anchor_and_no_side_dies():
    head = small("atss").head
    sides, centers = head.regression_head([torch.rand(1, 16, 4, 4)])
    assert torch.allclose(sides, torch.full_like(sides, 0.5), atol=0.1) and centers.shape == (1, 16, 1)
    torch.nn.init.constant_(head.regression_head.bbox_reg.bias, -5.0)
    head.regression_head([torch.rand(1, 16, 4, 4)])[0].sum().backward()
    assert (head.regression_head.bbox_reg.bias.grad > 0).all()
    torch.nn.init.constant_(head.regression_head.bbox_reg.bias, 1e4)
    assert head.regression_head([torch.rand(1, 16, 4, 4)])[0].isfinite().all()
