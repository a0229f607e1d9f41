"""Detectors that are not trained yet keep as many boxes as the base, so that they can be timed."""

import torch
from torchvision.ops import boxes as box_ops

from jdkd.detect.proposals import nms_counts, steady_nms
from tests.detectors import detector, small_spec

IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def test_every_nms_is_counted_and_kept_to_whatever_the_weights_say():
    model = detector(small_spec())
    model.roi_heads.score_thresh = 0.0
    counts = nms_counts(model, IMAGES)
    assert len(counts) == 2 and min(counts) > 0, "of the RPN and of the second stage"
    each = [nms_counts(model, [image]) for image in IMAGES]
    assert counts == tuple(round(sum(pair) / 2) for pair in zip(*each, strict=True)), "the mean over images"
    other = detector(small_spec(), seed=1)
    other.roi_heads.score_thresh = 0.0
    wanted = (7, 3)
    with steady_nms(wanted):
        assert nms_counts(other, IMAGES) == wanted
        assert len(other.eval()([IMAGES[0]])[0]["boxes"]) == 3
    assert nms_counts(model, IMAGES) == counts, "afterwards NMS is what it was"


def test_the_best_scores_are_kept_and_no_more_than_there_are():
    boxes, scores = torch.rand(4, 4), torch.tensor([0.1, 0.9, 0.5, 0.2])
    with steady_nms((2, 9)):
        assert box_ops.batched_nms(boxes, scores, torch.zeros(4), 0.5).tolist() == [1, 2]
        assert sorted(box_ops.batched_nms(boxes, scores, torch.zeros(4), 0.5).tolist()) == [0, 1, 2, 3]


def test_a_detector_without_torchvisions_nms_is_timed_as_it_is():
    assert nms_counts(torch.nn.Sequential(Boxes()), IMAGES) == ()
    before = box_ops.batched_nms
    with steady_nms(()):
        assert box_ops.batched_nms is before


class Boxes(torch.nn.Module):
    """Finds one box in every image, the whole of it."""

    def forward(self, images):
        found = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
        return [{"boxes": found, "labels": torch.ones(1).long(), "scores": torch.ones(1)} for _ in images]
