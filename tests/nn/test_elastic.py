"""Elastic layers: equal to the plain layer they export, sharing its state, refusing what does not fit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.nn import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear
from tests.dispatched import Dispatched

CHANNELS = [
    pytest.param(None, None, id="all"),
    pytest.param(5, 7, id="leading"),
    pytest.param([3, 0, 4], 7, id="listed-in"),
    pytest.param(5, torch.tensor([11, 2, 3]), id="listed-out"),
    pytest.param((1, 5), [0, 11], id="listed-both"),
]
CONVOLUTIONS = [
    pytest.param({"kernel_size": 3, "padding": 1}, id="3x3"),
    pytest.param({"kernel_size": 1, "bias": False}, id="1x1"),
    pytest.param({"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": 2}, id="uneven"),
    pytest.param({"kernel_size": 3, "padding": "same"}, id="same"),
    pytest.param({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, id="reflect"),
]


def _images(channels: int, *, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(0))  # [N, C, H, W]
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _assert_same_training(elastic: nn.Module, plain: nn.Module, x: torch.Tensor, active: dict) -> None:
    """Outputs and gradients agree, and the shared gradient is exactly zero where nothing is active."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(value) for layer, value in zip((elastic, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    dout = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    for output in outputs:
        output.backward(dout)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in plain.named_parameters():
        shared = getattr(elastic, name).grad
        torch.testing.assert_close(shared[active[name]], parameter.grad)
        rest = shared.clone()
        rest[active[name]] = 0
        assert not rest.any(), f"{name} has a gradient where it is inactive"


def _indices(value, maximum: int) -> torch.Tensor:
    if value is None:
        return torch.arange(maximum)
    return torch.arange(value) if isinstance(value, int) else torch.as_tensor(value)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize(("inputs", "outputs"), CHANNELS)
def test_convolution_equals_its_export(inputs, outputs, options, channels_last):
    elastic = ElasticConv2d(6, 12, **options)
    if channels_last:
        elastic.to(memory_format=torch.channels_last)
    elastic.set_active(inputs, outputs)
    rows, columns = _indices(outputs, 12), _indices(inputs, 6)
    plain = elastic.export()
    assert type(plain) is nn.Conv2d
    assert (plain.in_channels, plain.out_channels) == (len(columns), len(rows))
    active = {"weight": (rows[:, None], columns), "bias": rows}
    _assert_same_training(elastic, plain, _images(len(columns), channels_last=channels_last), active)


@pytest.mark.parametrize(
    ("options", "chosen", "rows"),
    [
        pytest.param((6, 6, 3, 1, 1, 1, 6), {"in_channels": 4}, range(4), id="leading"),
        pytest.param((6, 6, 3, 1, 1, 1, 6), {"out_channels": [5]}, [5], id="one"),
        pytest.param((6, 6, 3, 1, 1, 1, 6), {"in_channels": [4, 0], "out_channels": [4, 0]}, [4, 0], id="listed"),
        pytest.param((3, 6, 3, 1, 1, 1, 3), {"in_channels": [2, 0]}, [4, 5, 0, 1], id="multiplier"),
        pytest.param((6, 9, 3, 1, 1, 1, 3), {"out_channels": 6}, range(6), id="groups"),
        pytest.param((6, 9, 3, 1, 1, 1, 3), {"in_channels": 2}, range(3), id="one-group"),
    ],
)
def test_grouped_convolution_keeps_whole_groups(options, chosen, rows):
    elastic = ElasticConv2d(*options)
    elastic.set_active(**chosen)
    plain = elastic.export()
    rows = torch.as_tensor(list(rows))
    assert plain.out_channels == len(rows)
    active = {"weight": rows, "bias": rows}
    _assert_same_training(elastic, plain, _images(plain.in_channels), active)


@pytest.mark.parametrize(("inputs", "outputs"), CHANNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_export(inputs, outputs, bias):
    elastic = ElasticLinear(6, 12, bias=bias)
    elastic.set_active(inputs, outputs)
    rows, columns = _indices(outputs, 12), _indices(inputs, 6)
    active = {"weight": (rows[:, None], columns), "bias": rows}
    _assert_same_training(elastic, elastic.export(), torch.randn(4, 3, len(columns)), active)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("channels", [None, 5, [7, 2, 3]])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_its_export_and_moves_only_active_statistics(channels, options, training):
    elastic = ElasticBatchNorm2d(8, **options).train(training)
    with torch.no_grad():
        for tensor in elastic.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    elastic.set_active(channels)
    rows = _indices(channels, 8)
    plain = elastic.export()
    assert plain.training is training
    before = copy.deepcopy(elastic.state_dict())
    active = {"weight": rows, "bias": rows}
    _assert_same_training(elastic, plain, 3 * _images(len(rows)) + 1, active)
    inactive = [k for k in range(8) if k not in rows]
    for name in ("running_mean", "running_var") if elastic.track_running_stats else ():
        torch.testing.assert_close(getattr(elastic, name)[rows], getattr(plain, name))
        torch.testing.assert_close(getattr(elastic, name)[inactive], before[name][inactive], rtol=0, atol=0)
        moved = not torch.equal(getattr(elastic, name)[rows], before[name][rows])
        assert moved is training


@pytest.mark.parametrize(
    ("elastic", "plain"),
    [
        (ElasticConv2d(6, 12, 3), nn.Conv2d(6, 12, 3)),
        (ElasticLinear(6, 12), nn.Linear(6, 12)),
        (ElasticBatchNorm2d(12), nn.BatchNorm2d(12)),
    ],
    ids=["conv", "linear", "norm"],
)
def test_state_dict_loads_from_and_into_the_plain_layer(elastic, plain):
    elastic.set_active([3, 1])
    elastic.load_state_dict(plain.state_dict())
    assert elastic.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.mul_(2)
    plain.load_state_dict(elastic.state_dict())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, elastic.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_keeps_its_subnet_when_the_original_changes(clone):
    original = ElasticConv2d(6, 12, 3)
    original.set_active([4, 1], 5)
    x = _images(2)
    expected = original(x)
    copied = clone(original)
    original.set_active()
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


def test_changing_the_subnet_runs_no_operator():
    layers = [ElasticConv2d(6, 12, 3), ElasticLinear(6, 12), ElasticBatchNorm2d(6)]
    with Dispatched() as dispatched:
        for layer in layers:
            layer.set_active(3)
            layer.set_active()
    assert dispatched.names == []


def test_leading_channels_are_views_and_their_gradient_is_written_once():
    layer = ElasticConv2d(6, 12, 3, bias=False)
    layer.set_active(4, 8)
    with Dispatched() as dispatched:
        y = layer(_images(4))
    forward = [name for name in dispatched.names if name not in ("randn", "detach")]
    assert forward == ["as_strided", "convolution"]
    with Dispatched() as dispatched:
        y.sum().backward()
    assert dispatched.names.count("convolution_backward") == 1
    assert sum(name in ("zeros", "new_zeros", "zeros_like") for name in dispatched.names) == 1
    assert sum(name in ("copy_", "clone", "add", "slice_backward") for name in dispatched.names) == 1


@pytest.mark.parametrize("layer", [ElasticConv2d(4, 6, 3), ElasticLinear(4, 6)], ids=["conv", "linear"])
def test_a_listed_parameter_may_be_written_before_backward(layer):
    layer.set_active(out_channels=[4, 1])
    x = torch.randn(2, 4, 5, 5) if isinstance(layer, ElasticConv2d) else torch.randn(2, 4)
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), [*layer.parameters()], retain_graph=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [*layer.parameters()]), expected)


def test_a_listed_gradient_lies_in_memory_as_its_parameter():
    layer = ElasticConv2d(4, 6, 3).to(memory_format=torch.channels_last)
    layer.set_active(out_channels=[4, 1])
    (gradient,) = torch.autograd.grad(layer(torch.randn(2, 4, 5, 5)).sum(), [layer.weight])
    assert gradient.stride() == layer.weight.stride()


def test_repr_shows_active_over_all():
    conv, linear, norm = ElasticConv2d(6, 12, 3), ElasticLinear(6, 12), ElasticBatchNorm2d(12)
    conv.set_active(4, [0, 5])
    linear.set_active(out_channels=3)
    norm.set_active(7)
    assert "active=4/6->2/12" in repr(conv)
    assert "active=6/6->3/12" in repr(linear)
    assert "active=7/12" in repr(norm)
    assert (conv.active_in_channels, conv.active_out_channels, norm.active_channels) == (4, 2, 7)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"in_channels": 7}, ["in_channels", "7", "6", "at most"]),
        ({"out_channels": list(range(13))}, ["out_channels", "13", "12", "wider"]),
        ({"out_channels": [0, 12]}, ["out_channels", "12", "0 to 11"]),
        ({"in_channels": [-1]}, ["in_channels", "-1", "6"]),
        ({"in_channels": [2, 3, 2]}, ["in_channels", "2 twice"]),
        ({"out_channels": []}, ["out_channels", "0 channels of 12"]),
        ({"out_channels": 0}, ["out_channels", "0 channels of 12"]),
        ({"out_channels": -3}, ["out_channels", "-3", "12"]),
        ({"in_channels": [True, False]}, ["in_channels", "True"]),
        ({"in_channels": torch.ones(6, dtype=torch.bool)}, ["in_channels", "boolean mask", "nonzero"]),
        ({"in_channels": torch.tensor([[0]])}, ["in_channels", "2-dimensional"]),
        ({"in_channels": torch.tensor([0.5])}, ["in_channels", "float32"]),
        ({"in_channels": 0.5}, ["in_channels", "0.5"]),
        ({"in_channels": "3"}, ["in_channels", "'3'"]),
    ],
)
@pytest.mark.parametrize(
    "kind", [lambda: ElasticConv2d(6, 12, 3), lambda: ElasticLinear(6, 12)], ids=["conv", "linear"]
)
def test_refuses_a_subnet_that_does_not_fit_and_stays_as_it_was(kind, chosen, words):
    layer = kind()
    layer.set_active(4, [7, 3])
    before = repr(layer)
    with pytest.raises(InputError) as caught:
        layer.set_active(**chosen)
    for word in [type(layer).__name__, *words]:
        assert word in str(caught.value)
    assert repr(layer) == before


def test_batch_norm_refuses_a_subnet_wider_than_its_supernet():
    with pytest.raises(InputError, match=r"ElasticBatchNorm2d.set_active: channels asks for 9 .* has 8"):
        ElasticBatchNorm2d(8).set_active(9)


@pytest.mark.parametrize(
    ("options", "chosen", "words"),
    [
        (
            {"in_channels": 6, "out_channels": 9, "groups": 3},
            {"in_channels": 3},
            ["in_channels=3", "multiple of 2"],
        ),
        (
            {"in_channels": 6, "out_channels": 9, "groups": 3},
            {"out_channels": [0, 1, 3]},
            ["out_channels", "depthwise"],
        ),
        (
            {"in_channels": 6, "out_channels": 6, "groups": 6},
            {"in_channels": 3, "out_channels": 4},
            ["3", "4", "leave"],
        ),
        (
            {"in_channels": 6, "out_channels": 6, "groups": 6},
            {"in_channels": [1, 2], "out_channels": [2, 1]},
            ["leave"],
        ),
    ],
)
def test_refuses_to_cut_a_group(options, chosen, words):
    layer = ElasticConv2d(**options, kernel_size=3)
    with pytest.raises(InputError) as caught:
        layer.set_active(**chosen)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (ElasticConv2d(6, 12, 3), torch.zeros(1, 5, 4, 4)),
        (ElasticLinear(6, 12), torch.zeros(1, 5)),
        (ElasticBatchNorm2d(6), torch.zeros(1, 5, 4, 4)),
    ],
    ids=["conv", "linear", "norm"],
)
def test_says_which_channels_disagree(layer, x):
    with pytest.raises(InputError, match=rf"{type(layer).__name__}: x has 5 channels but 6 .* active"):
        layer(x)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(ElasticConv2d(6, 12, 3), torch.zeros(6, 4)), (ElasticLinear(6, 12), torch.tensor(0.0))],
    ids=["conv", "linear"],
)
def test_says_that_an_input_has_no_channels(layer, x):
    with pytest.raises(InputError, match=rf"{type(layer).__name__}: x has shape .* no dimension -\d of channels"):
        layer(x)


def test_copies_and_pickles_of_a_compiled_layer_are_not_compiled():
    conv, x = ElasticConv2d(3, 4, 1), torch.ones(1, 3, 2, 2)
    conv.compile(backend="eager")
    conv.set_active(out_channels=2)
    expected = conv(x)
    twin = copy.deepcopy(conv)
    torch.testing.assert_close(pickle.loads(pickle.dumps(conv))(x), expected)
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert not twin(x).any()


def test_a_small_supernet_trains_through_its_subnets():
    torch.manual_seed(0)
    conv, norm, head = ElasticConv2d(3, 16, 3, padding=1), ElasticBatchNorm2d(16), ElasticLinear(16, 2)
    net = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    images = torch.randn(16, 3, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0).long()  # [N]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)

    def loss_at(width):
        conv.set_active(out_channels=width)
        norm.set_active(width)
        head.set_active(in_channels=width)
        return nn.functional.cross_entropy(net(images), labels)

    first = [loss_at(width).item() for width in (4, 16)]
    for _ in range(60):
        optimizer.zero_grad()
        (loss_at(4) + loss_at([1, 5, 9]) + loss_at(16)).backward()
        optimizer.step()
    last = [loss_at(width).item() for width in (4, 16)]
    assert all(after < 0.7 * before for before, after in zip(first, last, strict=True))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize(("inputs", "outputs"), CHANNELS)
def test_a_fixed_subnet_compiles_into_one_graph(inputs, outputs):
    torch._dynamo.reset()
    conv, norm = ElasticConv2d(6, 12, 3, padding=1), ElasticBatchNorm2d(12)
    conv.set_active(inputs, outputs)
    norm.set_active(outputs)
    net = nn.Sequential(conv, norm)
    x = _images(conv.active_in_channels)
    expected = copy.deepcopy(net)(x)
    y = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    rows = _indices(outputs, 12)
    assert conv.weight.grad[rows].any()
    assert not conv.weight.grad[[k for k in range(12) if k not in rows]].any()
