import torch
from torch import nn

from jdkd.latency import count


def test_counts_what_pencil_and_paper_count(make_detector):
    width, fpn, model = 16, 8, make_detector(16)
    cost = count(model, (64, 64))  # stem at 16x16, level "1" at 8x8; 3 anchors a place, 20 proposals, 4 classes
    fine, coarse = 16 * 16, 8 * 8
    backbone = fine * (3 * 49 * width + 2 * 9 * width**2) + coarse * 9 * width**2
    neck = (fine + coarse) * (width * fpn + 9 * fpn**2)
    rpn = (fine + coarse) * (9 * fpn**2 + fpn * 3 * (1 + 4))
    heads = 20 * (49 * fpn * 1024 + 1024 * 1024 + 1024 * 4 * (1 + 4))
    assert cost.gmacs == (backbone + neck + rpn + heads) / 1e9
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())


def test_does_not_depend_on_the_weights(make_detector):
    assert count(make_detector(seed=0)) == count(make_detector(seed=1))


def test_takes_the_detectors_own_input_size_and_leaves_it_as_it_was(model):
    model.train()
    model.backbone.eval()
    assert count(model).size == (64, 96)
    assert model.training and not model.backbone.training and model.rpn.training
    assert type(model.rpn).__name__ == "RegionProposalNetwork"


def test_narrower_costs_less(make_detector):
    assert count(make_detector(8)).gmacs < count(make_detector(16)).gmacs
    assert isinstance(make_detector(8), nn.Module) and torch.is_grad_enabled()
