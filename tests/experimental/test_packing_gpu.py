"""What only a GPU can show of packed layers: graphs whose replays pack again, and a host that never waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jdkd.experimental import pack_forwards, packed
from jdkd.nn import set_subnet
from tests.experimental.packing_cases import SUBNETS
from tests.nn.elastic_models import images, supernet

pytestmark = pytest.mark.gpu
scopes = pytest.mark.parametrize("scope", [packed, pack_forwards])
modes = pytest.mark.parametrize("mode", ["autograd", "main_grad"])


def _net(name: str = "listed") -> nn.Module:
    net = supernet().cuda()
    set_subnet(net, SUBNETS[name])
    return net


def _step(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        y = net(x)
    y.float().square().sum().backward()
    return y


@scopes
@torch.no_grad()
def test_replays_see_what_was_written_since_the_capture(scope):
    net, x = _net(), images().cuda()
    with scope(net):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
    for _ in range(2):
        for parameter in net.parameters():
            parameter.mul_(1.1)
        graph.replay()
        torch.testing.assert_close(y, net(x), rtol=1e-3, atol=1e-3)


@scopes
@modes
def test_the_host_never_waits(scope, mode):
    net, x = _net(), images().cuda()
    with scope(net, grad_mode=mode):
        _step(net, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for name in ("leading", "listed"):
                set_subnet(net, SUBNETS[name])
                _step(net, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@scopes
@modes
@pytest.mark.parametrize("name", SUBNETS)
def test_gradients_are_those_of_slices(name, mode, scope):
    net, plain, x = _net(name), _net(name), images().cuda()
    _step(plain, x)
    with scope(net, grad_mode=mode):
        _step(net, x)
    for (path, found), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), path
        if expected.grad is not None:
            assert (found.grad - expected.grad).norm() <= 2e-2 * expected.grad.norm(), path
