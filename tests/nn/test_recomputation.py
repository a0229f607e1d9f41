"""A checkpointed forward keeps its subnet: its recomputation uses that one, or raises."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import jdkd.nn
from jdkd.errors import InputError
from jdkd.experimental import ElasticConvBNAct
from jdkd.nn import ElasticBatchNorm2d, ElasticConv2d, Subnet, as_elastic_block, set_subnet
from tests.nn.elastic_models import SMALL, supernet

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
CHANGES = {
    "lists of equal length": (Subnet({"stage.0.inner": [0, 1]}), Subnet({"stage.0.inner": [3, 5]})),
    "counts": (Subnet({"stage.0.inner": 2}), Subnet({"stage.0.inner": 4})),
    "kernel sizes": (Subnet(kernel_sizes={"stage.0.conv1": 3}), Subnet()),
    "deeper": (Subnet(depths={"stage": 1}), Subnet(depths={"stage": 2})),
    "shallower": (Subnet(depths={"stage": 2}), Subnet(depths={"stage": 1})),
}
changes = pytest.mark.parametrize(("first", "second"), CHANGES.values(), ids=CHANGES)


def _features() -> torch.Tensor:
    return torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()  # [N, C, H, W]


def _gradients(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    return {"x": x.grad, **{name: parameter.grad for name, parameter in net.named_parameters()}}


def _without_checkpoint(*subnets: Subnet) -> dict[str, torch.Tensor | None]:
    net, x, losses = supernet(), _features(), []
    for subnet in subnets:
        set_subnet(net, subnet)
        losses.append(net.stage(x).square().sum())
    sum(losses).backward()
    return _gradients(net, x)


@reentrant
@changes
def test_torchs_checkpoint_raises_after_a_change_of_subnet(first, second, use_reentrant):
    net = supernet()
    set_subnet(net, first)
    loss = torch_checkpoint(net.stage, _features(), use_reentrant=use_reentrant).square().sum()
    set_subnet(net, second)
    with pytest.raises(InputError, match=r"subnet was set after the checkpointed forward .* jdkd.nn.checkpoint"):
        loss.backward()
    net.stage(_features()).sum().backward()  # without a checkpoint all is well


@reentrant
@changes
def test_our_checkpoint_brings_the_subnet_of_the_forward_back(first, second, use_reentrant):
    net, x = supernet(), _features()
    set_subnet(net, first)
    loss = jdkd.nn.checkpoint(net.stage, x, use_reentrant=use_reentrant).square().sum()
    set_subnet(net, second)
    now = repr(net)
    loss.backward()
    assert repr(net) == now
    for name, expected in _without_checkpoint(first).items():
        torch.testing.assert_close(_gradients(net, x)[name], expected)


@reentrant
def test_two_checkpointed_subnets_share_one_backward(use_reentrant):
    net, x, losses = supernet(), _features(), []
    small = Subnet({"stage.0.inner": SMALL["channels"]["stage.0.inner"], "stage.2.inner": [5, 0]})
    subnets = [small, *CHANGES["lists of equal length"]]
    for subnet in subnets:
        set_subnet(net, subnet)
        run = jdkd.nn.checkpoint(lambda x: net.stage(x), x, model=net, use_reentrant=use_reentrant)
        losses.append(run.square().sum())
    sum(losses).backward()
    for name, expected in _without_checkpoint(*subnets).items():
        torch.testing.assert_close(_gradients(net, x)[name], expected)


@reentrant
def test_torchs_checkpoint_works_where_the_subnet_stays(use_reentrant):
    first, second = CHANGES["lists of equal length"]
    net, x = supernet(), _features()
    for _ in range(2):
        for subnet in (first, second):
            set_subnet(net, subnet)
            net.zero_grad()
            x.grad = None
            loss = torch_checkpoint(net.stage, x, use_reentrant=use_reentrant).square().sum()
            set_subnet(net, Subnet.from_json(subnet.to_json()))  # no change
            loss.backward()
            for name, expected in _without_checkpoint(subnet).items():
                torch.testing.assert_close(_gradients(net, x)[name], expected)


@reentrant
def test_a_layer_set_to_what_it_is_has_not_changed(use_reentrant):
    conv = ElasticConv2d(8, 8, 1)
    conv.set_active(out_channels=[3, 1])
    y = torch_checkpoint(conv, torch.randn(1, 8, 2, 2).requires_grad_(), use_reentrant=use_reentrant)
    conv.set_active(out_channels=[3, 1])
    y.sum().backward()
    assert conv.weight.grad[[1, 3]].all()


@reentrant
def test_a_function_may_set_its_subnet_itself(use_reentrant):
    net, x, losses = supernet(), _features(), []
    subnets = CHANGES["lists of equal length"]
    for subnet in subnets:

        def run(x, subnet=subnet):
            set_subnet(net, subnet)
            return net.stage(x)

        losses.append(torch_checkpoint(run, x, use_reentrant=use_reentrant).square().sum())
    sum(losses).backward()
    for name, expected in _without_checkpoint(*subnets).items():
        torch.testing.assert_close(_gradients(net, x)[name], expected)


@reentrant
@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (ElasticConv2d(8, 8, 1).requires_grad_(False), lambda conv, rows: conv.set_active(out_channels=rows)),
        (ElasticBatchNorm2d(8, affine=False).eval(), lambda norm, rows: norm.set_active(rows)),
        (as_elastic_block(nn.Sequential(nn.Softplus())), lambda block, rows: block.set_active(rows[0] == 0)),
    ],
    ids=["frozen convolution", "frozen norm", "plain block"],
)
def test_raises_where_no_saved_tensor_would_tell(layer, change, use_reentrant):
    x = torch.randn(2, 2, 4, 4) if isinstance(layer, ElasticBatchNorm2d) else torch.randn(2, 8, 4, 4)
    change(layer, [0, 5])
    y = torch_checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant)
    change(layer, [1, 2])
    with pytest.raises(InputError, match=rf"{type(layer).__name__}: its subnet was set after"):
        y.sum().backward()


@reentrant
def test_a_checkpoint_within_a_checkpoint(use_reentrant):
    first, second = CHANGES["lists of equal length"]
    net, x = supernet(), _features()

    def outer(x):
        return jdkd.nn.checkpoint(net.stage, x, use_reentrant=use_reentrant)

    set_subnet(net, first)
    loss = jdkd.nn.checkpoint(outer, x, model=net, use_reentrant=use_reentrant).square().sum()
    set_subnet(net, second)
    loss.backward()
    for name, expected in _without_checkpoint(first).items():
        torch.testing.assert_close(_gradients(net, x)[name], expected)


def test_a_function_gets_its_keyword_arguments():
    unit, plain = ElasticConvBNAct(4, 4, 1), ElasticConvBNAct(4, 4, 1)
    plain.load_state_dict(unit.state_dict())
    x, found = torch.randn(2, 4, 3, 3), []
    for layer, run in ((unit, jdkd.nn.checkpoint), (plain, lambda unit, *inputs, **named: unit(*inputs, **named))):
        residual = torch.ones(2, 4, 3, 3, requires_grad=True)
        run(layer, x, residual=residual).square().sum().backward()
        found.append((layer.conv.weight.grad, residual.grad))
    torch.testing.assert_close(*found)


def test_says_that_it_needs_the_model():
    with pytest.raises(InputError, match="give the model whose elastic layers it runs as model="):
        jdkd.nn.checkpoint(lambda x: x, torch.zeros(1))
