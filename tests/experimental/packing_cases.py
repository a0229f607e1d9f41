"""What the tests of packed layers share: subnets, a training step, and a count of the launches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from jdkd.nn import ElasticConv2d, ElasticLinear, Subnet, packed_weight, set_subnet
from tests.nn.elastic_models import SMALL, Net, images, supernet

SUBNETS = {
    "whole": Subnet(),
    "leading": Subnet({"stream": 5, "stage.0.inner": 2, "stage.1.inner": 4}),
    "listed": Subnet(SMALL["channels"]),
    "kernel sizes": Subnet({"stage.2.inner": 3}, SMALL["kernel_sizes"]),
    "depth": Subnet({"stream": [7, 0, 3]}, depths={"stage": 2}),
}
Gradients = dict[str, Tensor | None]


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights every launch packs, from now on."""
    counts: list[int] = []
    plain = packed_weight.packed_weights

    def counted(weights: Sequence[Tensor], *args: object) -> list[Tensor]:
        counts.append(len(weights))
        return plain(weights, *args)

    monkeypatch.setattr(packed_weight, "packed_weights", counted)
    return counts


def small(name: str = "listed") -> Net:
    net = supernet()
    set_subnet(net, SUBNETS[name])
    return net


def step(net: nn.Module, x: Tensor | None = None) -> Tensor:
    """A loss whose gradients are no constants, and its backward."""
    y = net(images() if x is None else x)
    y.square().sum().backward()
    return y.detach()


def gradients(net: nn.Module) -> Gradients:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def nothing_packed(net: nn.Module) -> bool:
    layers = [layer for layer in net.modules() if isinstance(layer, ElasticConv2d | ElasticLinear)]
    return all(layer._packed is None for layer in layers)
