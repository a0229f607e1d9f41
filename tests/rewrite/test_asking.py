"""Rewrites that are asked for wrongly, along another model's topology, or of a model in a wrapper."""

import numpy as np
import pytest
import torch
from torch import nn

from jdkd.detect import detector as dense
from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import trace
from jdkd.rewrite import Rewrite, describe
from tests.detectors import build as build_detector
from tests.detectors import small_spec
from tests.graph.networks import Residual

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (Rewrite(keep={"0": 3}), "what group '0' is to keep must be a list of whole numbers, got 3"),
        (Rewrite(keep={"0": [0.5, 1.5]}), "must be a list of whole numbers"),
        (Rewrite(keep={"0": [True, False]}), "must be a list of whole numbers"),
        (Rewrite(keep={"0": torch.ones(8) > 0}), "must be a list of whole numbers"),
        (Rewrite(extra={"0": 1.5}), "extra of group '0' must be a list of whole numbers"),
        (Rewrite(extra={"0": True}), "must be a list of whole numbers"),
        (Rewrite(blocks={"1": 0}), "blocks of the list '1' must be a list of whole numbers"),
        (Rewrite(blocks={"1": "0"}), "must be a list of whole numbers"),
        (Rewrite(attributes={"0.padding": 1}), r"'0.padding' is \(1, 1\), a tuple, and cannot become 1"),
        (Rewrite(attributes={"0.padding_mode": 1}), "cannot become 1"),
        (Rewrite(attributes={"2.eps": "small"}), "cannot become 'small'"),
        (Rewrite(attributes={"2.eps": True}), "cannot become True"),
    ],
)
def test_a_rewrite_of_another_kind_is_refused_in_a_sentence(rewrite, message):
    model = _streamed()
    with pytest.raises(InputError, match=message):
        rewrite.apply(model, trace(model, X))


def test_units_may_be_numbers_of_numpy_or_torch():
    model = _streamed()
    topology = trace(model, X)
    for units in (range(2), np.arange(2), torch.arange(2), np.arange(2, dtype=np.int8)):
        assert Rewrite(keep={"0": units}).apply(model, topology)[0].out_channels == 2


@pytest.mark.parametrize(
    "rewrite", [Rewrite(keep={"0": range(8)}), Rewrite(extra={"0": 1}), Rewrite(blocks={"1": [1]})]
)
def test_a_topology_from_before_a_rewrite_is_refused(rewrite):
    model = _streamed()
    topology = trace(model, X)
    for before in (Rewrite(keep={"0": range(5)}), Rewrite(extra={"0": 1}), Rewrite(blocks={"1": [0]})):
        if not (before.extra and rewrite.blocks) and not (before.keep and rewrite.blocks):  # whose blocks are the same
            with pytest.raises(InputError, match=r"the topology was read off another model.*read the model again"):
                rewrite.apply(before.apply(model, topology), topology)


def _streamed() -> nn.Sequential:
    blocks = nn.Sequential(*(Residual(8, 4) for _ in range(2)))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()


def test_a_rewrite_inside_a_wrapper_brings_the_architecture_up_to_date():
    wrapped = nn.DataParallel(_detector())
    topology = read(wrapped)
    child = Rewrite(keep={topology.groups[0].name: [0]}).apply(wrapped, topology)
    known = child.module.architecture
    assert known != wrapped.module.architecture and known == describe(
        child, known.builder, known.arguments, classes=known.classes
    )
    assert known.shapes and "architecture" not in vars(child)


def test_a_rewrite_that_leaves_no_block_in_a_container_is_refused():
    model = dense("fcos", "resnet18", 2, channels=32)
    topology = read(model)
    whole = next(b for b in topology.block_lists if len(model.get_submodule(b.container)) == len(b.blocks))
    with pytest.raises(InputError, match=f"nothing is left in {whole.container}.*keep one"):
        Rewrite(blocks={whole.name: []}).apply(model, topology)


def _detector() -> nn.Module:
    return build_detector(small_spec())
