"""Elastic kernel size in the modules: equal to the export, aligned with the whole kernel, transformed where asked."""

import copy

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.nn import ElasticConv2d

CONVOLUTIONS = {
    "5x5": {"kernel_size": 5, "padding": 2},
    "dilated": {"kernel_size": 5, "padding": 5, "dilation": 2, "stride": 2},
    "uneven": {"kernel_size": (4, 5), "padding": (1, 3), "bias": False},
    "same": {"kernel_size": 5, "padding": "same"},
    "reflect": {"kernel_size": 5, "padding": (2, 3), "padding_mode": "reflect"},
    "circular-same": {"kernel_size": (4, 5), "padding": "same", "padding_mode": "circular"},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 6},
    "transform": {"kernel_size": 5, "padding": 2, "kernel_transform": True},
    "depthwise-transform": {"kernel_size": 5, "padding": 2, "groups": 6, "kernel_transform": True},
}
convolutions = pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def _layer(options: dict) -> ElasticConv2d:
    torch.manual_seed(0)
    layer = ElasticConv2d(6, 6, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("transform"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def _smaller(layer: ElasticConv2d) -> tuple[int, int]:
    return tuple(size - 2 for size in layer.kernel_size)


@convolutions
@pytest.mark.parametrize("channels", [None, 4, [5, 0, 3]], ids=["all", "leading", "listed"])
def test_a_smaller_kernel_equals_its_export(options, channels):
    layer = _layer(options)
    layer.set_active(channels, channels, _smaller(layer))
    plain = layer.export()
    assert type(plain) is nn.Conv2d
    assert plain.kernel_size == layer.active_kernel_size == _smaller(layer)
    x = torch.randn(2, plain.in_channels, 11, 12)
    torch.testing.assert_close(layer(x), plain(x))


@convolutions
def test_outputs_stay_in_place_when_the_kernel_shrinks(options):
    layer = _layer({**options, "kernel_transform": False})
    x = torch.randn(2, 6, 11, 12)
    full = copy.deepcopy(layer)
    rows, columns = (slice(1, size - 1) for size in layer.kernel_size)
    with torch.no_grad():
        masked = torch.zeros_like(layer.weight)
        masked[..., rows, columns] = layer.weight[..., rows, columns]
        full.weight.copy_(masked)
    layer.set_active(kernel_size=_smaller(layer))
    torch.testing.assert_close(layer(x), full(x))


@convolutions
def test_gradients_are_exactly_zero_outside_the_centre(options):
    layer = _layer({**options, "kernel_transform": False})
    layer.set_active(4, 4, _smaller(layer))
    layer(torch.randn(2, 4, 11, 12)).square().sum().backward()
    rows, columns = (slice(1, size - 1) for size in layer.kernel_size)
    active = layer.weight.grad[:4, :4, rows, columns]
    assert active.all()
    assert layer.weight.grad.count_nonzero() == active.numel()


def test_two_kernel_sizes_add_their_gradients_in_one_graph():
    layer = _layer({"kernel_size": 5, "padding": 2})
    x = torch.randn(2, 6, 7, 7)
    outputs, gradients = [], []
    for size, channels in ((3, 4), (5, [2, 0]), (1, 6)):
        layer.set_active(out_channels=channels, kernel_size=size)
        outputs.append(layer(x).square().sum())
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.weight)[0])
    sum(outputs).backward()
    torch.testing.assert_close(layer.weight.grad, sum(gradients))


def test_a_transform_is_the_identity_at_birth_and_is_learned():
    plain, layer = ElasticConv2d(6, 6, 7, padding=3), ElasticConv2d(6, 6, 7, padding=3, kernel_transform=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 6, 9, 9)
    for size in (7, 5, 3, 1):
        plain.set_active(kernel_size=size)
        layer.set_active(kernel_size=size)
        torch.testing.assert_close(layer(x), plain(x))
    layer.set_active(kernel_size=3)
    layer(x).square().sum().backward()
    assert layer.transform_7to5.grad.any() and layer.transform_5to3.grad.any()
    assert layer.transform_3to1.grad is None, "1x1 was not asked for"


def test_a_transform_follows_once_for_all():
    layer = _layer({"kernel_size": 5, "padding": 2, "kernel_transform": True})
    layer.set_active(4, [5, 1], 1)
    weight = layer.weight[[5, 1], :4].double()
    for matrix, size in ((layer.transform_5to3, 3), (layer.transform_3to1, 1)):
        centre = weight[:, :, 1:-1, 1:-1].reshape(-1, size * size)
        weight = torch.einsum("fk,jk->fj", centre, matrix.double()).reshape(2, 4, size, size)
    torch.testing.assert_close(layer.export().weight.double(), weight, rtol=1e-5, atol=1e-6)


def test_transforms_are_in_the_state_dict_only_where_asked_for():
    assert ElasticConv2d(2, 2, 5).state_dict().keys() == nn.Conv2d(2, 2, 5).state_dict().keys()
    layer = _layer(CONVOLUTIONS["transform"])
    assert layer.state_dict().keys() - nn.Conv2d(2, 2, 5).state_dict().keys() == {"transform_5to3", "transform_3to1"}
    other = ElasticConv2d(6, 6, 5, padding=2, kernel_transform=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, 5, 5)
    for each in (layer, other):
        each.set_active(kernel_size=3)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_reset_parameters_makes_transforms_the_identity_again():
    meta = ElasticConv2d(6, 6, 5, padding=2, kernel_transform=True, device="meta")
    for layer in (_layer(CONVOLUTIONS["transform"]), meta.to_empty(device="cpu")):
        layer.transform_3to1.data.fill_(7.0)
        layer.reset_parameters()
        assert torch.equal(layer.transform_5to3, torch.eye(9)) and torch.equal(layer.transform_3to1, torch.eye(1))
        assert layer.transform_5to3.requires_grad and layer.transform_5to3.is_leaf
        assert layer.weight.std() < 0.1, "uniform with a bound of 1 / sqrt(150), as nn.Conv2d draws it"


def test_repr_shows_the_taps_that_are_active():
    layer = _layer(CONVOLUTIONS["transform"])
    assert "taps" not in repr(layer) and "kernel_transform=True" in repr(layer)
    layer.set_active(4, kernel_size=3)
    assert "active=4/6->6/6, 3x3/5x5 taps" in repr(layer)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("name", ["5x5", "reflect", "transform"])
def test_a_smaller_kernel_compiles_into_one_graph(name):
    torch._dynamo.reset()
    layer = _layer(CONVOLUTIONS[name])
    layer.set_active(4, [5, 0], 3)
    x = torch.randn(2, 4, 7, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"kernel_size": 5}, 3, ["1, 1 pixels less", "padding=(0, 0)"]),
        ({"kernel_size": 5, "padding": "valid"}, 3, ["1, 1 pixels less", "'valid'"]),
        ({"kernel_size": 5, "padding": 2, "dilation": 2}, 1, ["4, 4 pixels less"]),
        ({"kernel_size": 5, "padding": 1, "padding_mode": "reflect"}, 1, ["2, 2 pixels less"]),
        ({"kernel_size": 5, "padding": 2}, 4, ["kernel_size=4", "5x5", "1, 3, 5"]),
        ({"kernel_size": (4, 5), "padding": 2}, (2, 7), ["kernel_size=(2, 7)", "4x5"]),
        ({"kernel_size": 5, "padding": 2, "kernel_transform": True}, (3, 1), ["(3, 1)", "square"]),
    ],
)
def test_refuses_a_kernel_that_does_not_fit_and_stays_as_it_was(options, size, words):
    layer = ElasticConv2d(6, 6, **options)
    layer.set_active(3)
    before = repr(layer)
    with pytest.raises(InputError) as caught:
        layer.set_active(4, kernel_size=size)
    for word in ["ElasticConv2d.set_active", *words]:
        assert word in str(caught.value)
    assert repr(layer) == before


def test_refuses_a_transform_of_an_oblong_kernel():
    with pytest.raises(InputError, match=r"square kernel and kernel_size=\(3, 5\)"):
        ElasticConv2d(6, 6, (3, 5), kernel_transform=True)
