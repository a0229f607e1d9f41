"""The elastic convolution that the levels of a pyramid share: equal to what it exports, however levels are given."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from jdkd.errors import InputError
from jdkd.experimental import ElasticLevelsConv2d, LevelsConv2d, compile_elastic, packed
from jdkd.nn import ElasticConv2d, ElasticGroups, Subnet, export, set_subnet

CHANNELS = [
    pytest.param(None, None, None, id="all"),
    pytest.param(5, 7, 3, id="leading"),
    pytest.param([3, 0, 4], [11, 2], 1, id="listed"),
]


def _levels(channels: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *size, generator=generator) for size in ((6, 7), (3, 4), (1, 2))]


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"kernel_transform": True}], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "kernel"), CHANNELS)
def test_equals_its_export_and_a_plain_convolution_of_every_level(inputs, outputs, kernel, options):
    layer = ElasticLevelsConv2d(6, 12, 5, padding=2, **options)
    plain = ElasticConv2d(6, 12, 5, padding=2, kernel_transform=options.get("kernel_transform", False))
    plain.load_state_dict(layer.state_dict())
    for each in (layer, plain):
        each.set_active(inputs, outputs, kernel)
    xs = _levels(layer.active_in_channels)
    exported = layer.export()
    assert type(exported) is LevelsConv2d and exported.activation == layer.activation
    assert list(exported.state_dict()) == ["weight", "bias"]
    for x, y, other in zip(xs, layer(xs), exported(xs), strict=True):
        expected = plain(x).relu() if "activation" in options else plain(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(other, expected)


def test_levels_come_back_as_they_were_given():
    layer = ElasticLevelsConv2d(3, 4, 3, padding="same")
    xs = _levels(3)
    ys = layer(xs)
    assert type(ys) is list and [y.shape[2:] for y in ys] == [x.shape[2:] for x in xs]
    for module in (layer, layer.export()):
        named = module(dict(zip("abc", xs, strict=True)))
        assert list(named) == ["a", "b", "c"]
        for given in (tuple(xs), dict(enumerate(xs)).values()):
            assert type(module(given)) is list
        for y, other, alone in zip(ys, named.values(), map(module, xs), strict=True):
            torch.testing.assert_close(other, y)
            torch.testing.assert_close(alone, y)


class Head(nn.Module):
    """Two convolutions over all levels, as the tower of a RetinaNet."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = ElasticLevelsConv2d(6, 8, 3, padding=1, activation="relu")
        self.scores = ElasticLevelsConv2d(8, 5, 3, padding=1)
        self.elastic_groups = ElasticGroups({"inner": [("tower", "out"), ("scores", "in")]})

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.scores(self.tower(levels))


def test_a_head_of_a_whole_model_takes_subnets_and_exports():
    head = Head()
    xs = _levels(6)
    for channels in (3, [7, 0, 2]):
        set_subnet(head, Subnet(channels={"inner": channels}))
        plain = export(head)
        assert not any(isinstance(module, ElasticConv2d) for module in plain.modules())
        for y, expected in zip(head(xs), plain(xs), strict=True):
            torch.testing.assert_close(y, expected)
    sum(y.sum() for y in head(xs)).backward()
    assert head.tower.weight.grad[[7, 0, 2]].any() and not head.tower.weight.grad[[1, 3, 4, 5, 6]].any()


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_compiled_head_is_compiled_once(activation):
    torch.compiler.reset()
    head = nn.Sequential(ElasticLevelsConv2d(6, 8, 5, padding=2, activation=activation))
    eager, xs = copy.deepcopy(head), _levels(6)
    counter = CompileCounter()
    compile_elastic(head, backend=counter)
    for outputs, kernel in ((8, 5), ([5, 2, 0], 3), (4, 1)):
        for net in (head, eager):
            net[0].set_active(None, outputs, kernel)
        for y, expected in zip(head(xs), eager(xs), strict=True):
            torch.testing.assert_close(y, expected)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_reads_its_packed_weight_and_hands_the_gradient_to_main_grad():
    layer, plain, xs = ElasticLevelsConv2d(6, 12, 5, padding=2), ElasticLevelsConv2d(6, 12, 5, padding=2), _levels(3)
    plain.load_state_dict(layer.state_dict())
    for each in (layer, plain):
        each.set_active([3, 0, 4], [11, 2], 3)
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    with packed(layer, grad_mode="main_grad"):
        ys = layer(xs)
        sum(y.square().sum() for y in ys).backward()
    expected = plain(xs)
    sum(y.square().sum() for y in expected).backward()
    for y, other in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, other)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_exports_the_shared_weight_and_not_the_packed_one():
    layer = ElasticLevelsConv2d(6, 12, 3, padding=1)
    layer.set_active(4, 5)
    with packed(layer, dtype=torch.bfloat16):
        exported = layer.export()
    assert exported.weight.dtype == torch.float32 and torch.equal(exported.weight, layer.weight[:5, :4])


def test_says_what_it_does():
    layer = ElasticLevelsConv2d(6, 12, 3, activation="relu")
    layer.set_active(3, 4)
    assert "active=3/6->4/12" in repr(layer) and "activation=relu" in repr(layer)
    assert "activation=relu" in repr(layer.export())


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect", "padding": 1}, {"activation": "gelu"}],
    ids=str,
)
def test_refuses_windows_and_activations_that_it_does_not_have(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ElasticLevelsConv2d(6, 12, 3, **options)


def test_refuses_levels_that_do_not_fit_what_is_active():
    layer = ElasticLevelsConv2d(6, 12, 3, padding=1)
    layer.set_active(5)
    with pytest.raises(InputError, match="level 0 has 6 channels but 5"):
        layer(_levels(6))
    with pytest.raises(InputError, match="no level"):
        layer([])
