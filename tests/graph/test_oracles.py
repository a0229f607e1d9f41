"""The trace against declarations that were written by hand, without a look at any tensor but for its size."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from jdkd.detect import read
from tests.detectors import detector, small_spec

BODY, FPN = "backbone.body", "backbone.fpn"
NORM = ("weight", "bias", "running_mean", "running_var")
Group = set[tuple[str, int, int]]  # (tensor, dimension, entries of it that belong to one channel)


def made(*layers: str) -> Group:
    """By convolutions or linear layers that have a bias."""
    return {(f"{layer}.{tensor}", 0, 1) for layer in layers for tensor in ("weight", "bias")}


def normed(conv: str, norm: str) -> Group:
    return {(f"{conv}.weight", 0, 1)} | {(f"{norm}.{tensor}", 0, 1) for tensor in NORM}


def read_by(*layers: str, repeat: int = 1) -> Group:
    return {(f"{layer}.weight", 1, repeat) for layer in layers}


def resnet(
    blocks: tuple[int, ...], convs: int, projected: tuple[bool, ...], tapped: tuple[bool, ...]
) -> Iterator[Group]:
    """A residual network: a stream for each stage, and what is between the convolutions of each block.

    Args:
        blocks: of each stage.
        convs: of each block.
        projected: which stages begin with a projection, and so a stream of their own.
        tapped: the streams of which stages the pyramid reads; the one of the last stage is nobody's else.
    """
    stream = normed(f"{BODY}.conv1", f"{BODY}.bn1")
    taps = iter(range(len(blocks)))
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            block = f"{BODY}.layer{stage}.{i}"
            stream |= read_by(f"{block}.conv1")
            if i == 0 and projected[stage - 1]:
                yield stream | read_by(f"{block}.downsample.0")
                stream = normed(f"{block}.downsample.0", f"{block}.downsample.1")
            for k in range(1, convs):
                yield normed(f"{block}.conv{k}", f"{block}.bn{k}") | read_by(f"{block}.conv{k + 1}")
            stream |= normed(f"{block}.conv{convs}", f"{block}.bn{convs}")
        if tapped[stage - 1]:
            stream |= read_by(f"{FPN}.inner_blocks.{next(taps)}.0")
    yield stream


def top_down(levels: int) -> Group:
    inner = [f"{FPN}.inner_blocks.{i}.0" for i in range(levels)]
    return made(*inner) | read_by(*(f"{FPN}.layer_blocks.{i}.0" for i in range(levels)))


def faster_rcnn(blocks: tuple[int, ...], convs: int, projected: tuple[bool, ...]) -> list[Group]:
    rpn, roi = "rpn.head", "roi_heads"
    predictor = f"{roi}.box_predictor"
    return [
        *resnet(blocks, convs, projected, (True,) * 4),
        top_down(4),
        made(*(f"{FPN}.layer_blocks.{i}.0" for i in range(4)))
        | read_by(f"{rpn}.conv.0.0")
        | read_by(f"{roi}.box_head.fc6", repeat=7 * 7),
        made(f"{rpn}.conv.0.0") | read_by(f"{rpn}.cls_logits", f"{rpn}.bbox_pred"),
        made(f"{roi}.box_head.fc6") | read_by(f"{roi}.box_head.fc7"),
        made(f"{roi}.box_head.fc7") | read_by(f"{predictor}.cls_score", f"{predictor}.bbox_pred"),
    ]


def retinanet(blocks: tuple[int, ...], convs: int) -> list[Group]:
    """Levels 3 to 7, all of them read by both towers; the extra ones are made of the pyramid's last."""
    kinds = {"classification_head": "cls_logits", "regression_head": "bbox_reg"}
    towers = {kind: [f"head.{kind}.conv.{i}.0" for i in range(4)] for kind in kinds}
    first, extra = [tower[0] for tower in towers.values()], [f"{FPN}.extra_blocks.p{k}" for k in (6, 7)]
    chains = [[*towers[kind], f"head.{kind}.{last}"] for kind, last in kinds.items()]
    return [
        *resnet(blocks, convs, (True,) * 4, (False, True, True, True)),
        top_down(3),
        made(*(f"{FPN}.layer_blocks.{i}.0" for i in range(3)), *extra) | read_by(*first, *extra),
        *(made(one) | read_by(after) for chain in chains for one, after in pairwise(chain)),
    ]


def agree(model: nn.Module, declared: list[Group]) -> None:
    traced = {frozenset((slot.tensor, slot.dim, slot.repeat) for slot in g.slots): g for g in read(model).groups}
    assert traced.keys() == {frozenset(group) for group in declared}
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for places, group in traced.items():
        assert {sizes[tensor][dim] for tensor, dim, repeat in places if repeat == 1} == {group.units}
        assert all(slot.offset == 0 for slot in group.slots)


@pytest.mark.parametrize(
    ("options", "convs", "projected"),
    [
        ({}, 2, (True,) * 4),
        ({"block": "bottleneck"}, 3, (True,) * 4),
        ({"norm": "frozen"}, 2, (True,) * 4),
        ({"stem": 16}, 2, (False, True, True, True)),  # the stem's stream goes on through the first stage
    ],
)
def test_a_detector_of_our_specs_is_coupled_as_declared(options, convs, projected):
    agree(detector(small_spec(**options)), faster_rcnn((2, 2, 2, 2), convs, projected))


@pytest.mark.parametrize(
    ("build", "declared"),
    [
        (fasterrcnn_resnet50_fpn, faster_rcnn((3, 4, 6, 3), 3, (True,) * 4)),
        (retinanet_resnet50_fpn, retinanet((3, 4, 6, 3), 3)),
    ],
    ids=["Faster R-CNN", "RetinaNet"],
)
def test_a_resnet_50_detector_of_torchvision_is_coupled_as_declared(build, declared):
    torch.manual_seed(0)
    agree(build(weights=None, weights_backbone=None, num_classes=5), declared)
