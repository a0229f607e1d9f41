"""Activation checkpointing of a model on packed weights: right gradients, by torch's checkpoint and by ours."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import jdkd.nn
from jdkd.errors import InputError
from jdkd.experimental import pack_forwards, packed
from jdkd.nn import ElasticConv2d, ElasticLinear, Subnet, set_subnet
from tests.experimental.packing_cases import (
    SUBNETS,
    Gradients,
    assert_same,
    gradients,
    launches,
    nothing_packed,
    small,
    step,
)
from tests.nn.elastic_models import Net, images

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
checkpoints = pytest.mark.parametrize("checkpoint", [torch_checkpoint, jdkd.nn.checkpoint], ids=["torchs", "ours"])
NAMES = ("leading", "listed", "kernel sizes", "depth")
# Every checkpoint in either form and mode, each with two of the subnets.
WAYS = [*itertools.product(["autograd", "main_grad"], [torch_checkpoint, jdkd.nn.checkpoint], [True, False])]
each = pytest.mark.parametrize(
    ("name", "mode", "checkpoint", "use_reentrant"),
    [(NAMES[(place + k) % 4], *way) for place, way in enumerate(WAYS) for k in (0, 1 + place // 4)],
)


class Checkpointed(Net):
    """The net with its stage checkpointed inside its forward."""

    checkpoint: Callable
    use_reentrant: bool

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = self.checkpoint(self.stage, x, use_reentrant=self.use_reentrant)
        return self.head(self.pool(x).flatten(1))


def _checkpointed(name: str, checkpoint: Callable, use_reentrant: bool) -> Checkpointed:
    net = small(name)
    net.__class__ = Checkpointed
    net.checkpoint, net.use_reentrant = checkpoint, use_reentrant
    return net


def _sliced(*names: str) -> Gradients:
    net = small()
    for name in names:
        set_subnet(net, SUBNETS[name])
        step(net)
    return gradients(net)


@each
def test_recomputation_inside_the_forwards_that_pack(name, mode, checkpoint, use_reentrant, monkeypatch):
    net, counts = _checkpointed(name, checkpoint, use_reentrant), launches(monkeypatch)
    with pack_forwards(net, grad_mode=mode):
        step(net)
        assert nothing_packed(net)
    assert_same(gradients(net), _sliced(name))
    assert len(counts) == 1 or (checkpoint is torch_checkpoint and counts[1:] == [1] * (len(counts) - 1))


@each
def test_recomputation_of_whole_forwards_that_pack(name, mode, checkpoint, use_reentrant):
    net = small(name)
    with pack_forwards(net, grad_mode=mode):
        checkpoint(net, images().requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
        assert nothing_packed(net)
    assert_same(gradients(net), _sliced(name))


@each
def test_recomputation_inside_packed_uses_what_was_packed(name, mode, checkpoint, use_reentrant, monkeypatch):
    net, counts = _checkpointed(name, checkpoint, use_reentrant), launches(monkeypatch)
    with packed(net, grad_mode=mode):
        for _ in range(2):
            step(net)
    assert_same(gradients(net), _sliced(name, name))
    assert len(counts) == 1


@reentrant
def test_our_checkpoint_keeps_what_was_packed_past_the_with(use_reentrant, monkeypatch):
    for name in NAMES:
        net, counts = _checkpointed(name, jdkd.nn.checkpoint, use_reentrant), launches(monkeypatch)
        with packed(net):
            loss = net(images()).square().sum()
            layers = [layer for layer in net.modules() if isinstance(layer, ElasticConv2d | ElasticLinear)]
            copied = [layer.weight for layer in layers if layer._packed.part is not None]
        with torch.no_grad():
            torch._foreach_mul_(copied, 3.0)
        loss.backward()
        assert_same(gradients(net), _sliced(name))
        assert nothing_packed(net) and len(counts) == 1


@reentrant
def test_torchs_checkpoint_past_the_with_is_right_by_slices_or_raises(use_reentrant):
    for name in NAMES:
        net = _checkpointed(name, torch_checkpoint, use_reentrant)
        with packed(net):
            loss = net(images()).square().sum()
        try:
            loss.backward()
        except CheckpointError:
            assert not use_reentrant and name in ("listed", "depth")
        else:
            assert_same(gradients(net), _sliced(name))


@reentrant
def test_our_checkpoint_brings_back_both_subnet_and_packed_weights(use_reentrant):
    for scope in (packed, pack_forwards):
        net, losses = _checkpointed("listed", jdkd.nn.checkpoint, use_reentrant), []
        names = ("listed", "kernel sizes", "depth", "listed")
        with scope(net):
            for name in names:
                set_subnet(net, SUBNETS[name])
                losses.append(net(images()).square().sum())
            sum(losses).backward()
        assert_same(gradients(net), _sliced(*names))


@reentrant
def test_torchs_checkpoint_still_raises_after_a_change_of_subnet(use_reentrant):
    for scope in (packed, pack_forwards):
        net = _checkpointed("listed", torch_checkpoint, use_reentrant)
        with scope(net):
            loss = net(images()).square().sum()
            set_subnet(net, Subnet({**dict(SUBNETS["listed"].channels), "stage.0.inner": [0, 4, 1]}))
            with pytest.raises(InputError, match="subnet was set after the checkpointed forward"):
                loss.backward()


@reentrant
@checkpoints
def test_recomputation_goes_into_main_grad(checkpoint, use_reentrant):
    net, expected = _checkpointed("listed", checkpoint, use_reentrant), _sliced("listed")
    convs = {path: p for path, p in net.named_parameters() if path.endswith(("conv1.weight", "conv2.weight"))}
    for weight in convs.values():
        weight.main_grad = torch.zeros_like(weight)
    with pack_forwards(net, grad_mode="main_grad"):
        step(net)
    assert all(weight.grad is None for weight in convs.values())
    assert_same({p: w.main_grad for p, w in convs.items()}, {p: expected[p] for p in convs})


@reentrant
@checkpoints
def test_recomputation_under_autocast(checkpoint, use_reentrant):
    found = []
    for scope in (packed, pack_forwards, None):
        net = _checkpointed("listed", checkpoint, use_reentrant)
        with scope(net) if scope else torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16):
                y = net(images())
            y.float().square().sum().backward()
        found.append(net.stage[0].conv1.weight.grad)
    for gradient in found[:2]:
        assert (gradient - found[2]).norm() < 2e-2 * found[2].norm()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_within_a_checkpoint():
    for scope in (packed, pack_forwards):
        for use_reentrant in (True, False):
            net = _checkpointed("listed", jdkd.nn.checkpoint, use_reentrant)
            with scope(net):
                x = images().requires_grad_()
                jdkd.nn.checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
            assert_same(gradients(net), _sliced("listed"))
