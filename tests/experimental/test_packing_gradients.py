"""Gradients of a model on packed weights: those of slices, in either mode, and nothing where nothing is active."""

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.experimental import pack_forwards, packed
from jdkd.nn import ElasticConv2d, ElasticLinear, Subnet, set_subnet
from tests.experimental.packing_cases import SUBNETS, Gradients, assert_same, gradients, launches, small, step
from tests.nn.elastic_models import images
from tests.ops.pack_cases import active_mask

modes = pytest.mark.parametrize("mode", ["autograd", "main_grad"])
scopes = pytest.mark.parametrize("scope", [packed, pack_forwards])
subnets = pytest.mark.parametrize("name", SUBNETS)


def _sliced(*names: str, amp: bool = False) -> Gradients:
    net = small()
    for name in names:
        set_subnet(net, SUBNETS[name])
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = net(images())
        y.float().square().sum().backward()
    return gradients(net)


def _weights(net: nn.Module) -> dict[str, nn.Parameter]:
    layers = {p: layer for p, layer in net.named_modules() if isinstance(layer, ElasticConv2d | ElasticLinear)}
    return {f"{path}.weight": layer.weight for path, layer in layers.items()}


@scopes
@modes
@subnets
def test_gradients_are_those_of_slices(name, mode, scope):
    net = small(name)
    with scope(net, grad_mode=mode):
        step(net)
    assert_same(gradients(net), _sliced(name))


@modes
def test_two_subnets_in_one_graph_are_right(mode):
    for scope in (packed, pack_forwards):
        net, losses = small(), []
        with scope(net, grad_mode=mode):
            for subnet in SUBNETS.values():
                set_subnet(net, subnet)
                losses.append(net(images()).square().sum())
            sum(losses).backward()
        assert_same(gradients(net), _sliced(*SUBNETS))


@modes
def test_micro_batches_share_one_packing_and_each_has_its_backward(mode, monkeypatch):
    net, counts = small(), launches(monkeypatch)
    with packed(net, grad_mode=mode):
        losses = [net(images()).square().sum() for _ in range(2)]
        losses[0].backward()
        step(net)
    losses[1].backward()
    assert len(counts) == 1
    assert_same(gradients(net), _sliced(*["listed"] * 3))


@scopes
@modes
@subnets
def test_inactive_parts_of_the_gradient_stay_untouched(name, mode, scope):
    poison = torch.nan if mode == "main_grad" else 7.0
    net = small(name)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    before = {path: weight.grad for path, weight in _weights(net).items()}
    with scope(net, grad_mode=mode):
        step(net)
    for path, weight in _weights(net).items():
        active = active_mask(weight, net.get_submodule(path.removesuffix(".weight"))._weight_part())
        if name == "depth" and path.startswith("stage.2"):
            active = torch.zeros_like(active)
        rest = weight.grad[~active]
        assert weight.grad is before[path]
        assert rest.isnan().all() if mode == "main_grad" else (rest == poison).all()


@scopes
def test_gradients_go_to_main_grad_where_there_is_one(scope):
    for name in ("listed", "whole"):
        net, expected = small(name), _sliced(name)
        for weight in _weights(net).values():
            weight.main_grad = torch.ones_like(weight, dtype=torch.float64)
        with scope(net, grad_mode="main_grad"):
            step(net)
        for path, parameter in net.named_parameters():
            if path in _weights(net):
                assert parameter.grad is None
                torch.testing.assert_close(parameter.main_grad.float() - 1, expected[path], rtol=1e-4, atol=1e-5)
            else:
                assert_same({path: parameter.grad}, {path: expected[path]})


@scopes
def test_main_gradients_of_several_dtypes_are_added_in_one_backward(scope):
    net, other = small().to(torch.bfloat16), small().to(torch.bfloat16)
    weights = _weights(net)
    for weight in [*weights.values()][::2]:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    x = images().to(torch.bfloat16)
    with scope(net, grad_mode="main_grad"):
        step(net, x)
    with scope(other, grad_mode="autograd"):
        step(other, x)
    for path, expected in _weights(other).items():
        weight = weights[path]
        found = weight.main_grad if hasattr(weight, "main_grad") else weight.grad
        assert (found is None) == (expected.grad is None) or not found.any()
        if expected.grad is not None:
            torch.testing.assert_close(found.to(torch.bfloat16), expected.grad)


@scopes
@modes
def test_gradients_under_autocast_are_those_of_slices(mode, scope):
    for name in ("leading", "listed"):
        net, expected = small(name), _sliced(name, amp=True)
        with scope(net, grad_mode=mode):
            with torch.autocast("cpu", torch.bfloat16):
                y = net(images())
            y.float().square().sum().backward()
        for path, gradient in gradients(net).items():
            assert gradient.dtype == torch.float32
            error = (gradient - expected[path]).norm() / expected[path].norm()
            assert error < 2e-2, (path, error)


@scopes
@modes
def test_a_step_between_forward_and_backward_leaves_the_gradients_those_of_the_forward(mode, scope):
    net = small()
    set_subnet(net, Subnet({"stream": 5, "stage.0.inner": 2, "stage.1.inner": 4, "stage.2.inner": [5, 1]}))
    step(net)
    expected = {path: weight.grad.clone() for path, weight in _weights(net).items()}
    net.zero_grad()
    with scope(net, grad_mode=mode):
        loss = net(images()).square().sum()
    with torch.no_grad():
        torch._foreach_mul_(list(_weights(net).values()), 3.0)
    loss.backward()
    assert_same({path: weight.grad for path, weight in _weights(net).items()}, expected)


@scopes
def test_such_a_step_is_refused_where_a_weight_is_active_as_a_whole(scope):
    net = small()
    with scope(net):
        loss = net(images()).square().sum()
    with torch.no_grad():
        torch._foreach_mul_(list(net.parameters()), 3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@scopes
def test_main_grad_goes_past_hooks_and_the_functional_interface(scope):
    net, seen, accumulated = small(), [], []
    net.stem.weight.register_hook(seen.append)
    net.stem.weight.register_post_accumulate_grad_hook(lambda weight: accumulated.append(weight.grad.clone()))
    with scope(net, grad_mode="main_grad"):
        step(net)
        assert seen == [None]
        torch.testing.assert_close(accumulated, [_sliced("listed")["stem.weight"]])
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(net(images()).sum(), net.stem.weight)


@scopes
def test_main_grad_adds_only_where_the_backward_pass_adds(scope):
    net, expected = small(), _sliced("listed")
    x = images().requires_grad_()
    with scope(net, grad_mode="main_grad"):
        loss = net(x).square().sum()
        torch.autograd.grad(loss, [x, net.stem.weight], retain_graph=True, allow_unused=True)
        assert all(weight.grad is None for weight in _weights(net).values())
        loss.backward(inputs=[net.stem.weight])
    found = {path: weight.grad for path, weight in _weights(net).items() if weight.grad is not None}
    assert_same(found, {"stem.weight": expected["stem.weight"]})


@pytest.mark.parametrize("gradient", [torch.zeros(2, 2), torch.zeros(1).expand(8, 8)], ids=["small", "expanded"])
def test_main_grad_refuses_memory_that_does_not_fit(gradient):
    net = nn.Sequential(ElasticLinear(8, 8), ElasticLinear(8, 8))
    net[0].set_active(4, 4)
    net[1].set_active(4, 4)
    net[0].weight.main_grad = gradient
    with pack_forwards(net, grad_mode="main_grad"), pytest.raises(InputError, match=r"main_grad of a weight \(8, 8\)"):
        net(torch.ones(1, 4)).sum().backward()
    assert not gradient.any()


def test_autograd_runs_hooks_on_whole_gradients():
    net, seen, accumulated = small(), [], []
    net.stem.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    net.stem.weight.register_post_accumulate_grad_hook(lambda weight: accumulated.append(weight.grad.shape))
    with pack_forwards(net):
        step(net)
    assert seen == accumulated == [net.stem.weight.shape]


@modes
def test_a_second_derivative_is_refused(mode):
    net = small()
    with packed(net, grad_mode=mode):
        x = images().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        if mode == "autograd":
            (first,) = torch.autograd.grad(net(x).square().sum(), net.stem.weight, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.square().sum().backward()
        slope.square().sum().backward()
    plain = small()
    y = images().requires_grad_()
    (slope,) = torch.autograd.grad(plain(y).square().sum(), y, create_graph=True)
    slope.square().sum().backward()
    torch.testing.assert_close(net.stem.weight.grad, plain.stem.weight.grad)


def test_main_grad_refuses_a_weight_that_keeps_no_gradient():
    net = small()
    parameters = {name: parameter * 1 for name, parameter in net.named_parameters()}
    for scope in (packed, pack_forwards):
        with (
            scope(net, grad_mode="main_grad"),
            pytest.raises(InputError, match=r"stem.weight is no leaf .* use grad_mode='autograd'"),
        ):
            torch.func.functional_call(net, parameters, images())
        assert net.stem._packed is None and net.stem._packing is None


@scopes
def test_training_follows_the_path_of_slices(scope):
    nets = small(), small()
    optimizers = [torch.optim.Adam(net.parameters(), 1e-2, fused=True) for net in nets]
    losses = []
    for net, optimizer in zip(nets, optimizers, strict=True):
        losses.append([])
        for subnet in list(SUBNETS.values()) * 2:
            set_subnet(net, subnet)
            optimizer.zero_grad()
            if net is nets[0]:
                with scope(net):
                    losses[-1].append(step(net).square().sum())
            else:
                losses[-1].append(step(net).square().sum())
            optimizer.step()
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-3, atol=1e-3)
