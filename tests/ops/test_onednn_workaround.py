"""What goes to ATen past a fault of oneDNN, which damages the heap, often without a wrong value to see."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jdkd._backend import use_backend
from jdkd.functional import elastic_conv2d, elastic_pointwise_conv2d
from jdkd.nn import ElasticConv2d
from jdkd.ops.active_channels import Channels
from jdkd.ops.elastic_implicit_gemm import implicit_gemm
from jdkd.ops.onednn_workaround import conv2d, conv2d_gradients

STRIDES = [(2, 1), (2, 2), (3, 2)]
strides = pytest.mark.parametrize("stride", STRIDES, ids=str)


class Gradients(TorchDispatchMode):
    """Notes the strides of the convolutions whose gradients ATen computes."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.strides.append(tuple(args[4]))
        return func(*args, **kwargs or {})


def _image(channels: int) -> torch.Tensor:
    x = torch.randn(2, channels, 9, 8, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def _elastic(weight, x):
    return elastic_conv2d(x, weight, in_channels=x.shape[1], out_channels=6, stride=2)


def _pointwise(weight, x):
    return elastic_pointwise_conv2d(x, weight, out_channels=6, stride=2)


def _gemm(weight, x):
    return implicit_gemm(x, weight, None, Channels(x.shape[1]), Channels(6), (2, 2), (0, 0), (1, 1))


few_channels = pytest.mark.parametrize(("channels", "expected"), [(7, (1, 1)), (15, (1, 1)), (16, (2, 2))])


@few_channels
def test_a_1x1_of_few_channels_has_no_stride_for_aten(channels, expected):
    weight = torch.randn(8, 20, 1, 1, requires_grad=True)
    with Gradients() as seen:
        _elastic(weight, _image(channels).requires_grad_()).sum().backward()
    assert seen.strides == [expected]


@few_channels
@pytest.mark.parametrize("convolve", [_pointwise, _gemm])
def test_it_has_none_inside_of_our_operators_either(monkeypatch, convolve, channels, expected):
    seen, aten = [], torch.ops.aten.convolution_backward
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", lambda *args: seen.append(args[4]) or aten(*args))
    with use_backend("reference"):
        convolve(torch.randn(8, 20, 1, 1, requires_grad=True), _image(channels).requires_grad_()).sum().backward()
    assert seen == [expected]


def test_a_transformed_kernel_of_one_tap_has_none_either():
    conv = ElasticConv2d(7, 8, 3, stride=2, padding=1, kernel_transform=True)
    conv.set_active(kernel_size=1)
    with Gradients() as seen:
        conv(_image(7)).sum().backward()
    assert seen.strides == [(1, 1)]


@strides
@pytest.mark.parametrize("groups", [1, 2])
def test_values_and_gradients_are_those_of_a_stride(stride, groups):
    x, weight = _image(6).requires_grad_(), torch.randn(8, 6 // groups, 1, 1, requires_grad=True)
    y = elastic_conv2d(x, weight, stride=stride, groups=groups)
    dout = torch.randn(y.shape)
    found = [y, *torch.autograd.grad(y, (x, weight), dout)]
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]  # oneDNN has no float64
    exact = torch.nn.functional.conv2d(*wide, stride=stride, groups=groups)
    exact = [exact, *torch.autograd.grad(exact, wide, dout.double())]
    for ours, value in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, value.float())
    dx, dweight, dbias = conv2d_gradients(dout, x.detach(), weight.detach(), stride, 0, 1, groups, [True, True, True])
    for ours, value in zip((dx, dweight, dbias), (*exact[1:], dout.double().sum((0, 2, 3))), strict=True):
        torch.testing.assert_close(ours, value.float())


@strides
def test_every_gradient_can_be_had_alone(stride):
    x, weight = _image(6), torch.randn(8, 6, 1, 1)
    given = torch.randn(conv2d(x, weight, stride=stride).shape), x, weight, stride, (0, 0), 1, 1
    together = conv2d_gradients(*given, [True] * 3)
    for place in range(3):
        torch.testing.assert_close(conv2d_gradients(*given, [i == place for i in range(3)])[place], together[place])
