"""Layers and blocks that are made elastic where they stand; the norms without running statistics."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from jdkd.errors import InputError
from jdkd.nn import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticFrozenBatchNorm2d,
    ElasticGroupNorm,
    ElasticGroups,
    Subnet,
    as_elastic,
    as_elastic_block,
    as_plain,
    export,
    set_subnet,
)


def drawn(layer: nn.Module) -> nn.Module:
    """The layer with numbers of no pattern."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) + 0.5)
    return layer


NORMS = {
    "frozen": (lambda c: drawn(FrozenBatchNorm2d(c)), ElasticFrozenBatchNorm2d),
    "group": (lambda c: drawn(nn.GroupNorm(c // 4, c)), ElasticGroupNorm),
    "plain group": (lambda c: nn.GroupNorm(c // 4, c, affine=False), ElasticGroupNorm),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("active", [12, 4, [8, 9, 10, 11, 0, 1, 2, 3]], ids=["all", "leading", "listed"])
def test_a_norm_of_active_channels_is_the_norm_of_those_alone(kind, active):
    make, elastic = NORMS[kind]
    layer = make(12)
    assert as_elastic(layer) is layer and isinstance(layer, elastic)
    layer.set_active(active)
    rows = torch.arange(active) if isinstance(active, int) else torch.tensor(active)
    alone = make(len(rows))
    for (_, part), (_, whole) in zip(alone.state_dict().items(), layer.state_dict().items(), strict=True):
        part.copy_(whole[rows])
    x = torch.randn(2, len(rows), 4, 5, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, alone(x))
    torch.testing.assert_close(layer.export()(x), y)
    assert type(layer.export()) is type(make(12)) and layer.active_channels == len(rows)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), y)
    y.square().sum().backward()
    for parameter in layer.parameters():
        rest = torch.ones(12, dtype=torch.bool).index_fill(0, rows, False)
        assert parameter.grad[rows].all() and not parameter.grad[rest].any()


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        (6, r"ElasticGroupNorm.set_active: channels=6 cuts through a norm group of 4 channels \(num_groups=3\)"),
        ([0, 1, 2, 4], "a list that is not of whole norm groups of 4 channels"),
        ([1, 2, 3, 4], "a list that is not of whole norm groups of 4 channels"),
        (13, "asks for 13 channels but the supernet has 12"),
    ],
)
def test_norm_groups_are_kept_whole(channels, words):
    layer = as_elastic(nn.GroupNorm(3, 12))
    layer.set_active(8)
    with pytest.raises(InputError, match=words):
        layer.set_active(channels)
    assert layer.active_channels == 8


def test_a_subnet_sets_norms_of_every_kind():
    layers = nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8), nn.GroupNorm(4, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    net = drawn(nn.Sequential(*map(as_elastic, layers))).eval()
    sides = [*((str(place), "out") for place in range(4)), ("4", "in")]
    net.elastic_groups = ElasticGroups({"inner": [(module, side, 2) for module, side in sides]})
    x = torch.rand(2, 3, 4, 4)
    for subnet in (Subnet({"inner": 3}), Subnet({"inner": [2, 0]}), Subnet()):
        set_subnet(net, subnet)
        plain = export(net)
        assert [type(layer) for layer in plain] == [type(as_plain(layer)) for layer in copy.deepcopy(net)]
        torch.testing.assert_close(net(x), plain(x))


class Two(nn.Module):
    """A block of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, other=None):
        return self.scale * x if other is None else x + other


def test_a_block_that_is_off_returns_its_first_input_however_it_is_given():
    block, x = as_elastic_block(Two()), torch.rand(3)
    assert isinstance(block, Two) and as_elastic_block(block) is block
    torch.testing.assert_close(block(x), 2 * x)
    torch.testing.assert_close(block(x, other=x), 2 * x)
    block.set_active(False)
    assert block(x) is x and block(x, torch.ones(3)) is x and block(x=x, other=None) is x
    assert "switched off" in repr(block) and not block.is_active
    other = pickle.loads(pickle.dumps(block))
    assert type(other) is type(block) and other(x) is x
    other.set_active()
    torch.testing.assert_close(other(x), 2 * x)
    assert (
        block(x) is x
        and type(as_plain(block)) is Two
        and vars(block) == vars(Two()) | {"_parameters": block._parameters}
    )


def test_a_sequence_that_is_a_block_can_be_cut_and_copied():
    block = as_elastic_block(nn.Sequential(nn.ReLU(), nn.Tanh()))
    block.set_active(False)
    assert type(block[:1]) is type(block) and len(block[:1]) == 1 and block[:1].is_active
    assert not copy.deepcopy(block).is_active


def test_export_drops_blocks_of_lists_and_puts_an_identity_elsewhere():
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (as_elastic_block(nn.Sequential(nn.Linear(4, 4))) for _ in range(2))
            self.more = nn.ModuleList(as_elastic_block(nn.Sequential(nn.Linear(4, 4))) for _ in range(3))

        def forward(self, x):
            x = self.second(self.first(x))
            for block in self.more:
                x = block(x)
            return x

    net, x = Custom(), torch.rand(2, 4)
    net.elastic_groups = ElasticGroups({}, {"own": ["first", "second"], "more": [f"more.{i}" for i in range(3)]})
    set_subnet(net, Subnet(depths={"own": 1, "more": 1}))
    plain = export(net)
    assert type(plain.second) is nn.Identity and len(plain.more) == 1 and type(plain.first) is nn.Sequential
    torch.testing.assert_close(plain(x), net(x))
    assert len(net.more) == 3 and net(x).shape == x.shape


def test_export_drops_a_block_with_the_blocks_in_it():
    inner = as_elastic_block(nn.Sequential(nn.Linear(4, 4)))
    net = nn.Sequential(nn.Linear(4, 4), as_elastic_block(nn.Sequential(inner, nn.Tanh())))
    for block in (inner, net[1]):
        block.set_active(False)
    assert len(export(net)) == 1
    net[1].set_active()
    assert [type(layer) for layer in export(net)[1]] == [nn.Tanh]


def test_only_layers_that_are_known_and_hold_no_more_change_their_class():
    with pytest.raises(InputError, match="as_elastic: a ConvTranspose2d has no elastic form; Conv2d, "):
        as_elastic(nn.ConvTranspose2d(3, 3, 1))
    for layer in (
        ElasticConv2d(3, 3, 3, kernel_transform=True),
        ElasticBatchNorm2d(3, statistics="own", subnets=["a"]),
    ):
        with pytest.raises(InputError, match="holds more than a plain layer"):
            as_plain(layer)
    assert type(as_plain(nn.Conv2d(3, 3, 1))) is nn.Conv2d
