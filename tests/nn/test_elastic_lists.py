"""Lists of active channels lie beside the weights, wherever these go, and can be saved for a backward pass."""

import torch
from torch import nn

from jdkd.nn import ElasticConv2d, ElasticLinear
from jdkd.ops.active_channels import Channels


def test_lists_follow_the_module_to_another_device():
    layer = ElasticConv2d(6, 12, 3)
    layer.set_active([4, 1], [0, 7])
    layer.to("meta")
    assert layer(torch.empty(1, 2, 5, 5, device="meta")).shape == (1, 2, 3, 3)
    assert layer._record.active.inputs.index.tolist() == [4, 1]


def test_lists_outlive_a_module_without_memory():
    layer = ElasticConv2d(6, 12, 3, device="meta")
    layer.set_active([4, 1], [0, 7])
    layer.to_empty(device="cpu")
    assert layer._record.active.inputs.index.tolist() == [4, 1]
    assert layer._record.active.outputs.index.tolist() == [0, 7]


def test_lists_follow_weights_that_are_assigned():
    with torch.device("meta"):
        conv = ElasticConv2d(8, 8, 3)
    conv.set_active([1, 3], [2, 4])
    state = nn.Conv2d(8, 8, 3).state_dict()
    conv.load_state_dict(state, assign=True)
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(conv(x), conv.export()(x))
    record = conv._record
    conv.load_state_dict(state)
    assert conv._record is record


def test_lists_are_kept_on_the_host_whatever_the_default_device():
    with torch.device("meta"):
        conv = ElasticConv2d(8, 8, 3)
        conv.set_active([1, 3], [2, 4])
    conv.to_empty(device="cpu").reset_parameters()
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(conv(x), conv.export()(x))


def test_a_subnet_that_was_set_in_inference_mode_trains():
    conv, linear, index = ElasticConv2d(8, 8, 3), ElasticLinear(8, 4), torch.tensor([2, 4])
    with torch.inference_mode():
        conv.set_active([1, 3], index + 0)
        linear.set_active(Channels(2, index + 0))
    y = linear(conv(torch.randn(1, 2, 5, 5)).mean((2, 3)))
    y.sum().backward()
    assert conv.weight.grad.flatten(2).any(2).nonzero().tolist() == [[2, 1], [2, 3], [4, 1], [4, 3]]
    assert linear.weight.grad.any(0).nonzero().flatten().tolist() == [2, 4]
