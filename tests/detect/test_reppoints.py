"""RepPoints against its rules, place by place in plain Python, and its points against a shifted convolution."""

import math
import statistics

import pytest
import torch
from torch.nn import functional as F

from jdkd.detect.reppoints import boxes_of_points, initial_assignment, refined_assignment
from tests.detect.places import STRIDES, drawn, drawn_boxes, iou, places, small


def initial_by_hand(anchors, boxes):
    best = [(math.inf, -1)] * len(anchors)
    for g, (x0, y0, x1, y1) in enumerate(boxes):
        level = math.floor(math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 4))
        stride = min(max(2**level, STRIDES[0]), STRIDES[-1])
        own = [a for a, anchor in enumerate(anchors) if anchor[2] - anchor[0] == stride]
        distance, a = min(
            (math.dist(((anchors[a][0] + anchors[a][2]) / 2, (anchors[a][1] + anchors[a][3]) / 2),
                       ((x0 + x1) / 2, (y0 + y1) / 2)), a)
            for a in own
        )  # fmt: skip
        if distance < best[a][0]:
            best[a] = (distance, g)
    return [g for _, g in best]


def refined_by_hand(predicted, boxes):
    table = [[iou(box, each) for each in predicted] for box in boxes]
    matched = []
    for a in range(len(predicted)):
        overlaps = [row[a] for row in table]
        own = [overlap if overlap == max(table[g]) else 0.0 for g, overlap in enumerate(overlaps)]
        highest = max(overlaps)
        if max(own) > 0:
            matched.append(own.index(max(own)))
        elif highest >= 0.5:
            matched.append(overlaps.index(highest))
        else:
            matched.append(-1 if highest < 0.4 else -2)
    return matched


@pytest.mark.parametrize("sizes", [(2, 60), (1, 3), (60, 300), (20, 120)], ids=["mixed", "tiny", "huge", "long"])
def test_first_points_are_trained_where_the_paper_has_them(sizes):
    anchors, per_level = places(scale=1)
    for seed in range(3):
        boxes = drawn_boxes(1 + 8 * seed, drawn(seed), *sizes)
        matched = initial_assignment(anchors, per_level, boxes).tolist()
        assert matched == initial_by_hand(anchors.tolist(), boxes.tolist())
        assert max(matched) >= 0
    assert initial_assignment(anchors, per_level, torch.zeros(0, 4)).unique().tolist() == [-1]


def test_refined_points_are_trained_where_the_first_boxes_fit():
    seen = set()
    for seed in range(4):
        boxes, noise = drawn_boxes(1 + seed, drawn(seed)).double(), 6 * torch.randn(40, 4, generator=drawn(seed + 9))
        predicted = boxes[torch.arange(40) % len(boxes)] + noise
        predicted = torch.cat((torch.minimum(*predicted.split(2, 1)), torch.maximum(*predicted.split(2, 1))), dim=1)
        matched = refined_assignment(predicted, boxes).tolist()
        assert matched == refined_by_hand(predicted.tolist(), boxes.tolist())
        seen |= {min(g, 0) for g in matched}
    assert seen == {0, -1, -2}


def test_an_object_that_no_box_touches_has_none():
    predicted = torch.tensor([[0.0, 0.0, 5.0, 5.0], [20.0, 20.0, 30.0, 30.0]])
    far, badly = torch.tensor([[50.0, 50.0, 51.0, 51.0]]), torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    assert refined_assignment(predicted, far).tolist() == [-1, -1], "not all of them, as all fit it equally badly"
    assert refined_assignment(predicted, badly).tolist() == [-1, 0], "what fits it best is its own"
    assert refined_assignment(predicted, torch.zeros(0, 4)).tolist() == [-1, -1]


def test_boxes_are_the_moments_of_points():
    points, log_scale = torch.randn(5, 9, 2, generator=drawn(1), dtype=torch.float64), torch.tensor([0.3, -0.2])
    for found, of_box in zip(boxes_of_points(points, log_scale).tolist(), points, strict=True):
        y, x = of_box.unbind(1)
        high = math.exp(0.3) * statistics.pstdev(y.tolist())
        wide = math.exp(-0.2) * statistics.pstdev(x.tolist())
        down, right = y.mean().item(), x.mean().item()
        assert found == pytest.approx([wide - right, high - down, right + wide, down + high], rel=1e-4)


def test_points_in_one_place_have_a_gradient():
    points = torch.zeros(1, 9, 2, requires_grad=True)
    boxes_of_points(points, torch.zeros(2)).square().sum().backward()
    assert points.grad.isfinite().all()


def test_deformable_convolutions_look_where_the_first_points_are():
    """Points that all lie two cells further down and one to the left see the features of there."""
    head = small("reppoints").head
    grid = torch.tensor([[y + 2.0, x - 1.0] for y in (-1, 0, 1) for x in (-1, 0, 1)])
    torch.nn.init.zeros_(head.initial_points.weight)
    head.initial_points.bias.data = grid.flatten()
    level = torch.rand(1, 16, 8, 8, generator=drawn(0))
    with torch.no_grad():
        found = head([level])
        feature = head.classification_tower(level)
        shifted = F.pad(feature, (1, 0, 0, 2))[:, :, 2:, :8]  # what lies at (y + 2, x - 1), zeros outside
        conv = F.conv2d(shifted, head.classification_deform.weight, head.classification_deform.bias, padding=1)
        expected = head.cls_logits(F.relu(conv))[:, :, 1:-1, 2:-1]
    logits = found["cls_logits"].unflatten(1, (8, 8)).permute(0, 3, 1, 2)[:, :, 1:-1, 2:-1]
    torch.testing.assert_close(logits[:, :, :4], expected[:, :, :4])
    side = math.sqrt(2 / 3)  # the standard deviation of -1, 0, 1
    first = torch.tensor([side + 1, side - 2, side - 1, side + 2]).expand(64, 4)
    torch.testing.assert_close(found["bbox_initial"][0], first)


def test_refined_points_begin_where_the_first_are_and_teach_these_nothing():
    head = small("reppoints").head
    torch.nn.init.normal_(head.initial_points.bias)
    torch.nn.init.zeros_(head.refined_points.weight)
    found = head([torch.rand(1, 16, 8, 8, generator=drawn(0))])
    assert torch.equal(found["bbox_regression"], found["bbox_initial"])
    found["bbox_regression"].square().sum().backward()
    assert not head.initial_points.bias.grad.any() and head.refined_points.bias.grad.any()


def test_multipliers_learn_at_a_hundredth_and_points_at_a_tenth_of_what_the_branches_send():
    head = small("reppoints").head.double()
    torch.nn.init.normal_(head.initial_points.bias, std=0.3, generator=drawn(1))
    level = torch.rand(1, 16, 8, 8, generator=drawn(0)).double()
    found = head([level])
    side = found["bbox_initial"][..., [0, 2]].sum().item() / 2  # half a width is scale * deviation
    found["bbox_initial"][..., 2].sum().backward(retain_graph=True)
    assert head.log_scale.grad.tolist() == [0, pytest.approx(0.01 * side)]

    def logits(shift: float) -> torch.Tensor:
        with torch.no_grad():
            head.initial_points.bias[3] += shift
            return head([level])["cls_logits"].square().sum()

    head.zero_grad()
    found["cls_logits"].square().sum().backward()
    slope = (logits(1e-5) - logits(-2e-5)).item() / 2e-5
    assert head.initial_points.bias.grad[3].item() == pytest.approx(0.1 * slope, rel=1e-3) and abs(slope) > 1e-6


def test_losses_are_those_of_plain_formulas():
    model = small("reppoints").double()
    anchors, per_level = places(scale=1)
    targets = [
        {"boxes": drawn_boxes(count, drawn(count), 12, 44), "labels": torch.tensor([1, 2, 2, 1, 1, 2])[:count]}
        for count in (6, 0)
    ]
    outputs = {"cls_logits": torch.randn(2, len(anchors), 3, generator=drawn(5)).double()}
    for seed, key in enumerate(("bbox_initial", "bbox_regression")):
        outputs[key] = 2.5 * torch.rand(2, len(anchors), 4, generator=drawn(seed)).double()
    losses = model.compute_loss(targets, outputs, [anchors.double()] * 2, per_level)
    sums, counts = dict.fromkeys(losses, 0.0), {"bbox_initial": 0, "bbox_regression": 0}
    ignored = 0
    for n, target in enumerate(targets):
        boxes, rows = target["boxes"].tolist(), anchors.tolist()
        first = [box_at(rows[a], outputs["bbox_initial"][n, a].tolist()) for a in range(len(rows))]
        own = {
            "bbox_initial": initial_by_hand(rows, boxes),
            "bbox_regression": refined_by_hand(first, boxes) if boxes else [-1] * len(rows),
        }
        for key, matched in own.items():
            for a, g in enumerate(matched):
                if g >= 0:
                    counts[key] += 1
                    found = box_at(rows[a], outputs[key][n, a].tolist())
                    for one, other in zip(found, boxes[g], strict=True):
                        off = abs(one - other) / (4 * (rows[a][2] - rows[a][0]))
                        sums[key] += off - 1 / 18 if off > 1 / 9 else 4.5 * off**2
        for a, g in enumerate(own["bbox_regression"]):
            ignored += g == -2
            for k, logit in enumerate(outputs["cls_logits"][n, a].tolist() if g != -2 else ()):
                p, positive = 1 / (1 + math.exp(-logit)), g >= 0 and target["labels"][g] == k
                sums["classification"] -= (
                    0.25 * (1 - p) ** 2 * math.log(p) if positive else 0.75 * p**2 * math.log(1 - p)
                )
    assert ignored and 1 < counts["bbox_initial"] != counts["bbox_regression"] > 1
    assert losses["bbox_initial"].item() == pytest.approx(0.5 * sums["bbox_initial"] / counts["bbox_initial"])
    refined = counts["bbox_regression"]
    assert losses["bbox_regression"].item() == pytest.approx(sums["bbox_regression"] / refined)
    assert losses["classification"].item() == pytest.approx(sums["classification"] / refined)


def box_at(anchor, sides):
    x, y, size = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, anchor[2] - anchor[0]
    left, top, right, bottom = (size * side for side in sides)
    return [x - left, y - top, x + right, y + bottom]
