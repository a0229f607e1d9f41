"""Packed layers across dtypes, autocast and the modes of autograd, and with frozen weights."""

import torch

from jdkd.experimental import packed
from jdkd.nn import ElasticConv2d
from tests.experimental.packing_cases import assert_same, gradients, launches, small, step
from tests.nn.elastic_models import images

BF16 = torch.bfloat16


def test_weights_of_several_dtypes_take_a_launch_each(monkeypatch):
    net, counts = small(), launches(monkeypatch)
    net.stage.double()
    with packed(net):
        assert sorted(counts) == [2, 8]
        assert net.head._packed.part.dtype == torch.float32
        assert net.stage[0].conv1._packed.part.dtype == torch.float64


def test_the_dtype_is_the_callers_or_that_of_autocast_or_the_weights(monkeypatch):
    net, x, counts = small(), images(), launches(monkeypatch)
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            expected = net(x)
        with packed(net):
            assert net(x).dtype == torch.float32
            with torch.autocast("cpu", BF16):
                for _ in range(2):
                    torch.testing.assert_close(net(x), expected)
                assert net.stem._packed.part.dtype == BF16
            assert net(x).dtype == torch.float32 and len(counts) == 3
        with packed(net, dtype=BF16):
            assert net.stem(x.bfloat16()).dtype == BF16
            with torch.autocast("cpu", BF16):
                torch.testing.assert_close(net(x), expected)


def test_a_region_without_autocast_uses_slices():
    conv, x = ElasticConv2d(4, 4, 1), torch.randn(1, 2, 3, 3)
    conv.set_active(2)
    with packed(conv), torch.autocast("cpu", BF16):
        assert conv(x).dtype == BF16
        with torch.autocast("cpu", enabled=False):
            assert conv.forward(x).dtype == torch.float32


def test_modes_of_autograd_may_change_inside(monkeypatch):
    plain = small()
    step(plain)
    for first in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        net = small()
        with first():
            scope = packed(net)
            scope.__enter__()
            net(images())
        step(net)
        with torch.inference_mode():
            net(images())
        scope.__exit__(None, None, None)
        torch.testing.assert_close(net.stage[0].conv1.weight.grad, plain.stage[0].conv1.weight.grad)


def test_what_was_packed_for_inference_serves_no_gradient_of_images():
    net = small().requires_grad_(False)
    with torch.inference_mode():
        scope = packed(net)
        scope.__enter__()
    x = images().requires_grad_()
    net.stem(x).sum().backward()
    net(x).sum().backward()
    scope.__exit__(None, None, None)
    assert x.grad.all()


def test_weights_may_be_frozen_and_thawed_inside():
    net, plain = small(), small()
    for model in (net, plain):
        model.requires_grad_(False)
    with packed(net):
        for model in (net, plain):
            model.stem.requires_grad_(True)
            model.stem(images()).square().sum().backward()
            step(model)
        assert_same(gradients(net), gradients(plain))
        assert net.stem._packed.part.requires_grad and not net.head._packed.part.requires_grad
        net.stem.requires_grad_(False).zero_grad()
        net.stem(images().requires_grad_()).sum().backward()
        step(net, images().requires_grad_())
        assert net.stem.weight.grad is None and net.stem.bias.grad is None
