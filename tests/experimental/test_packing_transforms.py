"""Packed layers under torch.compile and torch.func, and in DistributedDataParallel: right, or as without packing."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap

from jdkd.experimental import pack_forwards, packed
from jdkd.nn import ElasticConv2d
from tests.experimental.packing_cases import assert_same, gradients, launches, small, step
from tests.nn.elastic_models import Net, images

ROOT = Path(__file__).resolve().parents[2]
scopes = pytest.mark.parametrize("scope", [packed, pack_forwards])
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning")  # by dynamo


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _two_layers() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(ElasticConv2d(3, 8, 3), nn.ReLU(), ElasticConv2d(8, 4, 1))
    net[0].set_active(None, [6, 1, 2])
    net[2].set_active([6, 1, 2], 2)
    return net


@scopes
def test_a_compiled_model_takes_slices_in_one_graph(scope, monkeypatch):
    net, plain, counts = _two_layers(), _two_layers(), launches(monkeypatch)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with scope(net):
        counts.clear()
        for _ in range(2):
            torch.testing.assert_close(step(compiled), step(plain))
    assert_same(gradients(net), gradients(plain))
    assert counter.frame_count == 1 and not counts


def test_a_compiled_model_stays_right_whenever_packing_begins_and_ends():
    net = _two_layers()
    expected, compiled = net(images()), torch.compile(net, backend="eager")

    @torch.compile(backend="eager")
    def run(x: Tensor) -> Tensor:
        with packed(net):
            return net(x)

    for scope in (nullcontext, packed, pack_forwards, nullcontext):
        with scope(net):
            torch.testing.assert_close(compiled(images()), expected)
    with torch.no_grad():
        torch.testing.assert_close(run(images()), expected)


def _parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: 1.5 * parameter.detach() for name, parameter in net.named_parameters()}


def _values(net: Net) -> list[Tensor]:
    given = {name: tensor.requires_grad_() for name, tensor in _parameters(net).items()}
    y = functional_call(net, given, images())
    return [y, *torch.autograd.grad(y.square().sum(), list(given.values()))]


def _gradient(net: Net) -> list[Tensor]:
    return list(grad(lambda given: functional_call(net, given, images()).square().sum())(_parameters(net)).values())


def _gradient_of_images(net: Net) -> list[Tensor]:
    return [grad(lambda x: net(x).square().sum())(images())]


def _each_image(net: Net) -> list[Tensor]:
    return [vmap(lambda x: net(x[None])[0])(images())]


def _gradient_of_each_image(net: Net) -> list[Tensor]:
    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, given, x[None]).square().sum()

    return list(vmap(grad(loss), (None, 0))(_parameters(net), images()).values())


def _forward_mode(net: Net) -> list[Tensor]:
    return list(jvp(net, (images(),), (images(),)))


CALLS = [_values, _gradient, _gradient_of_images, _each_image, _gradient_of_each_image, _forward_mode]


@scopes
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.strip("_"))
@pytest.mark.parametrize("name", ["leading", "listed"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch, in forward mode
def test_functional_calls_give_what_they_give_without(name, call: Callable, scope):
    net = small(name)
    expected = call(net)
    with scope(net):
        net(images())
        for found, value in zip(call(net), expected, strict=True):
            assert (found - value).norm() <= 1e-5 * value.norm()
        torch.testing.assert_close(net(images()), small(name)(images()))
