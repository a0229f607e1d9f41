"""How far a file and its detector agree, and where they part."""

import numpy as np
import pytest
import torch

from jdkd.errors import InputError
from jdkd.export.parity import TOLERANCES, Parity, parity, require_parity, where_it_parts
from tests.export.tiny import formed, made, pictures

FINE = TOLERANCES["fp32"]


def found(*rows):
    """Of ``(left, top, right, bottom, label, score)``."""
    table = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].astype(np.int64), "scores": table[:, 5]}


ONE, TWO = (0, 0, 40, 40, 1, 0.9), (50, 50, 90, 90, 2, 0.8)


@pytest.mark.parametrize(
    ("theirs", "same", "other"),
    [
        ([TWO, ONE], 4, 0),  # in another order
        ([ONE], 2, 1),
        ([ONE, TWO, (0, 0, 9, 9, 1, 0.5)], 4, 1),
        ([ONE, (50, 50, 90, 90, 1, 0.8)], 2, 2),  # of another class
        ([ONE, (50, 50, 90, 90, 2, 0.81)], 2, 2),  # of another score
        ([ONE, (51, 50, 91, 90, 2, 0.8)], 2, 2),  # elsewhere
        ([ONE, TWO, TWO], 4, 1),  # twice
        ([ONE, TWO, (0, 0, 9, 9, 1, 0.3005)], 4, 0),  # as low as what is kept at all
    ],
)
def test_detections_are_matched_by_class_place_and_score(theirs, same, other):
    counted = Parity()
    parts = counted.compare(found(ONE, TWO), found(*theirs), FINE, lambda mine, its: 0.3)
    assert (counted.same, counted.other, parts) == (same, other, other > 0)


def test_masks_count():
    ours, theirs = found(ONE), found(ONE)
    ours["masks"] = np.zeros((1, 60, 60), dtype=np.float32)
    ours["masks"][0, :40, :40] = 1
    theirs["masks"] = np.roll(ours["masks"], 2, axis=1)
    counted = Parity()
    assert counted.compare(ours, theirs, FINE, lambda mine, its: 0.3)
    assert not counted.compare(ours, ours, FINE, lambda mine, its: 0.3)


def test_what_is_too_far_apart_is_said():
    assert "finds nothing on these images, so there is nothing to compare; give" in Parity(images=3).complaint(FINE)
    assert Parity(1, same=990, other=10).complaint(FINE) is None
    assert "only 98.90% of 1,000 detections" in Parity(1, same=989, other=11).complaint(FINE)
    assert Parity(1, same=10, maps={"boxes": (0.5, 0.5009)}).complaint(FINE) is None
    assert "mAP of masks is 0.5000 eager and 0.5011" in Parity(1, 10, maps={"masks": (0.5, 0.5011)}).complaint(FINE)


@pytest.mark.parametrize(
    ("family", "path", "stage"),
    [
        ("fcos", "backbone.halves.1", "they part at level 2: values"),
        ("atss", "head.regression_head.bbox_reg", "they part at bbox_regression of level 0: values"),
        ("ssd", "head.regression_head.module_list.0", "they part at bbox_regression: values"),
        ("fasterrcnn", "rpn.head.bbox_pred", "they part at bbox_deltas of level 0: values"),
        ("fasterrcnn", "roi_heads.box_predictor.bbox_pred", "all agree up to proposals; they part behind it"),
    ],
)
def test_the_first_stage_that_differs_is_named(family, path, stage):
    model, other = made(family), made(family)
    with torch.no_grad():
        other.get_submodule(path).bias += 1
    (image,) = pictures((96, 128))
    assert where_it_parts(model, formed(other, stages=True), image).startswith(stage)
    file = formed(other)
    compared = parity(model, file, [(image, {})])
    with pytest.raises(InputError, match=f"was not written: only .*{stage}"):
        require_parity(model, file, compared, lambda: formed(other, stages=True))
