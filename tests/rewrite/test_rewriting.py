"""Rewrites as data, and what of a checked topology holds after one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import Frozen, Topology, trace
from jdkd.graph.topology import DISAGREES
from jdkd.morph import add_block
from jdkd.rewrite import Rewrite, build, verify
from tests.graph.networks import Residual, awake, conv
from tests.morph.small import SIZE, parent
from tests.rewrite.blocks import FREE, Block

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Reversed(nn.Module):
    """A residual block whose code knows how many channels it has inside: cut, it is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.out(torch.cat(torch.split(self.into(x), 4, 1)[::-1], 1).relu())


class Newest(nn.Module):
    """A residual block that takes the last of its channels by their number: it can be cut, and cannot grow."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.cheap, self.out = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        made = self.into(x)
        return x + self.out(torch.cat((made, self.cheap(made)), 1)[:, :8])


class Gate(nn.Module):
    """A residual block that adds one half where it is silent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.conv(x).sigmoid()


class Doubled(nn.Module):
    """A residual block around another module."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.out = inside, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.out(self.inside(x))


def stack(*blocks: nn.Module) -> nn.Module:
    return awake(nn.Sequential(conv(3, 8), nn.Sequential(*blocks), nn.Conv2d(8, 2, 1)))


def checked(model: nn.Module) -> Topology:
    return verify(model, trace(model, X), X)


def rewritten(model: nn.Module, topology: Topology, **what) -> tuple[nn.Module, Topology]:
    """The child, and its topology as traced."""
    child = Rewrite(**what).apply(model, topology)
    return child, trace(child, X)


# ---- data


def test_a_rewrite_leaves_the_model_alone_and_its_child_says_what_it_is():
    model, topology = parent("fcos")
    before = model.architecture
    name = "backbone.body.1.0.conv1"
    child = Rewrite(
        keep={name: range(8)},
        blocks={"backbone.body.1": [0, 0]},
        attributes={"transform.max_size": 77},
    ).apply(model, topology)
    assert topology[name].size == 16 and model.get_submodule(name).out_channels == 16 and model.architecture is before
    assert child.get_submodule(name).out_channels == 8 and child.transform.max_size == 77
    known = child.architecture
    assert known.shapes[f"{name}.weight"][0] == 8 and known.attributes == {"transform.max_size": 77}
    assert known.blocks == {"backbone.body.1": (0, 1, 1)} and known.builder == before.builder
    build(known, "meta").load_state_dict(child.state_dict(), assign=True)


def test_a_rewrite_of_nothing_is_a_copy():
    model = stack(Residual(8, 6))
    child = Rewrite().apply(model, trace(model, X))
    child[0][0].weight.data.zero_()
    assert model[0][0].weight.abs().min() > 0 and not hasattr(child, "architecture")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"keep": {"9": [0]}}, "no channel group '9'"),
        ({"extra": {"0.0": -1}}, "give 0 or more"),
        ({"blocks": {"9": [0]}}, "'9' is no list of residual blocks"),
        ({"attributes": {"0.padding_mood": 3}}, "attributes sets '0.padding_mood'"),
    ],
)
def test_what_is_not_there_is_refused(what, words):
    model = stack(Residual(8, 6))
    with pytest.raises(InputError, match=words):
        Rewrite(**what).apply(model, trace(model, X))
    with pytest.raises(InputError, match="either keeps channels or adds some"):
        Rewrite(keep={"0.0": [0]}, extra={"0.0": 1})


def test_the_levels_of_a_pyramid_are_followed_through_a_cut():
    model, topology = parent("fcos")
    name = topology.followed[0][0][0]
    assert topology.followed == (tuple((name, unit) for unit in range(32)),) * 4
    rewrite = Rewrite(keep={name: range(1, 32, 3), "backbone.body.1.0.conv1": range(5)})
    assert rewrite.surviving(topology.followed[1]) == tuple(range(1, 32, 3))
    assert rewrite.surviving((None, ("other", 3), (name, 0), (name, 1))) == (0, 1, 3)  # what cannot go stays
    only_neck = Rewrite(keep={name: rewrite.keep[name]})
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = only_neck.apply(model, topology).backbone(x), model.backbone(x)
    for key, level in zip(ours, topology.followed, strict=True):
        torch.testing.assert_close(ours[key], theirs[key][:, list(only_neck.surviving(level))])


# ---- growth and identity


@pytest.mark.parametrize("name", FREE)
def test_a_block_of_every_piece_is_born_as_the_identity_and_leaves_as_if_never_there(name):
    x = X.double()
    for around in (lambda piece: piece, Doubled):  # some are residual blocks by themselves
        torch.manual_seed(0)
        model = stack(*(around(FREE[name]()) for _ in range(2))).double()
        topology = verify(model, trace(model, x), x)
        if any(each.container == "1" for each in topology.block_lists):
            break
    (blocks,) = (each for each in topology.block_lists if each.container == "1")
    assert blocks.can_grow and not topology.held
    longer = Rewrite(blocks={blocks.name: [0, 0, 1, 1]}).apply(model, topology)
    with torch.no_grad():
        torch.testing.assert_close(longer(x), model(x), rtol=1e-9, atol=1e-9)
    back = Rewrite(blocks={blocks.name: [0, 2]}).apply(longer, trace(longer, x))
    assert all(torch.equal(one, other) for one, other in zip(back.parameters(), model.parameters(), strict=True))


class Counted(nn.Module):
    """A backbone that gives out what leaves its layers at some places."""

    def __init__(self, *layers: nn.Module, places: tuple[int, ...]) -> None:
        super().__init__()
        self.layers, self.places = nn.Sequential(*layers), places

    def forward(self, x):
        found = []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.places:
                found.append(x.mean((2, 3)))
        return torch.cat(found, 1)


class Named(nn.ModuleDict):
    """The same, by the names of its layers."""

    def forward(self, x):
        found = {}
        for name, layer in self.items():
            x = found[name] = layer(x)
        return torch.cat([found[name].mean((2, 3)) for name in ("b", "d")], 1)


def blocks_of(count: int) -> list[nn.Module]:
    return [Residual(8, 4 + 2 * k) for k in range(count)]


def test_blocks_before_a_place_that_code_counts_stay():
    model = awake(nn.Sequential(conv(3, 8), Counted(*blocks_of(5), places=(2,)), nn.Linear(8, 2)))
    topology = checked(model)
    assert [blocks.blocks for blocks in topology.block_lists] == [("1.layers.3", "1.layers.4")]
    assert set(topology.held) == {"1.layers.0", "1.layers.1", "1.layers.2"}
    assert all("differs" in why for why in topology.held.values())
    _, found = rewritten(model, topology, blocks={"1.layers": [0, 1, 1]})
    again = found.trusting(topology)
    assert [blocks.blocks for blocks in again.block_lists] == [("1.layers.3", "1.layers.4", "1.layers.5")]
    assert again.held == topology.held and len(found.block_lists[0].blocks) == 6


class Taken(Counted):
    """The same, one map and not its mean."""

    def forward(self, x):
        return [x := layer(x) for layer in self.layers][self.places[0]]


def test_another_size_is_another_output():
    model = awake(nn.Sequential(conv(3, 8), Taken(*blocks_of(2), nn.MaxPool2d(2), places=(1,)), nn.Conv2d(8, 2, 1)))
    topology = checked(model)
    assert not topology.block_lists and topology.held["1.layers.0"] == "1 differs by inf"


def test_blocks_that_code_calls_by_name_stay_and_part_their_list():
    names = dict(zip("abcde", blocks_of(5), strict=True))
    model = awake(nn.Sequential(conv(3, 8), Named(names), nn.Linear(16, 2)))
    topology = checked(model)
    assert [(blocks.name, blocks.blocks) for blocks in topology.block_lists] == [
        ("1.a", ("1.a",)),
        ("1.c", ("1.c",)),
        ("1.e", ("1.e",)),
    ]
    assert set(topology.held) == {"1.b", "1.d"} and "KeyError" in topology.held["1.b"]
    assert '"1.b": "KeyError' in topology.to_json()
    child, found = rewritten(model, topology, blocks={"1.a": [], "1.c": [0, 0]})
    torch.testing.assert_close(  # what stays between them stays there
        child(X), model[2](torch.cat([y.mean((2, 3)) for y in passed(model, "b", "c", "d")], 1))
    )
    assert [blocks.blocks for blocks in found.trusting(topology).block_lists] == [("1.c", "1.c+1"), ("1.e",)]


def passed(model: nn.Module, *names: str) -> list[torch.Tensor]:
    x, found = model[0](X), {}
    for name in names:
        x = found[name] = model[1][name](x)
    return [found["b"], found["d"]]


class Repeated(nn.Module):
    """A list whose length is a factor: blocks may not be repeated, though each can be silent."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks_of(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x * max(2, len(self.blocks))


def test_a_list_whose_copies_change_the_model_cannot_grow():
    model = awake(nn.Sequential(conv(3, 8), Repeated(), nn.Conv2d(8, 2, 1)))
    topology = checked(model)
    assert not topology.held and [blocks.can_grow for blocks in topology.block_lists] == [False]


def test_a_list_grows_by_its_last_block_that_can_be_born_as_the_identity():
    model = stack(Residual(8, 6), Gate())
    topology = checked(model)
    assert topology.block_lists[0].copied == 0
    morph = add_block(model, topology, "1")
    assert morph.rewrite.blocks == {"1": (0, 1, 0)}
    torch.testing.assert_close(morph.apply(model, topology)(X), model(X))


# ---- what was found of the parent holds of the child


def test_a_distrusted_group_stays_distrusted_when_numbers_shift():
    model = stack(Residual(8, 6), Reversed(), Residual(8, 6))
    topology = checked(model)
    assert "1.1.into" not in {group.name for group in topology.groups}
    child, found = rewritten(model, topology, blocks={"1": [1, 2]})
    assert "1.0.into" in {group.name for group in found.groups}  # a trace alone does not know
    trusted = found.trusting(topology)
    assert {group.name for group in found.groups} - {group.name for group in trusted.groups} == {"1.0.into"}
    _, found = rewritten(child, trusted, blocks={"1": [1, 0]})
    assert {group.name for group in found.trusting(trusted).groups} == {"0.0", "1.0.branch.0.0"}  # and of its child


def test_a_distrusted_group_casts_no_doubt_on_others_of_its_name_elsewhere():
    model = awake(nn.Sequential(conv(3, 8), nn.Sequential(Reversed()), nn.Sequential(Reversed()), nn.Conv2d(8, 2, 1)))
    traced = trace(model, X)
    topology = replace(
        traced,
        groups=tuple(group for group in traced.groups if group.name != "1.0.into"),
        frozen=(*traced.frozen, Frozen(tuple((s.tensor, s.dim) for s in traced["1.0.into"].slots), f"{DISAGREES}: x")),
    )
    assert "2.0.into" in {group.name for group in traced.trusting(topology).groups}
    assert "1.0.into" not in {group.name for group in traced.trusting(topology).groups}


class Mixed(Reversed):
    """The same names inside, and an operator that mixes channels, as every trace shows."""

    def forward(self, x):
        return x + self.out(self.into(x).softmax(1))


def test_what_a_trace_shows_of_one_block_holds_of_no_other():
    model = stack(Block(lambda m, x: x + m.out(m.into(x).relu()), into=nn.Conv2d(8, 12, 1), out=nn.Conv2d(12, 8, 1)))
    model[1].append(Mixed())
    topology = checked(model)
    names = {group.name for group in topology.groups}
    assert "1.0.into" in names and "1.1.into" not in names
    _, found = rewritten(model, topology, blocks={"1": [0]})
    assert "1.0.into" in {group.name for group in found.trusting(topology).groups}


def test_a_group_that_cannot_grow_cannot_when_numbers_shift():
    model = stack(Residual(8, 6), Newest())
    topology = checked(model)
    assert [group.name for group in topology.groups if not group.grows] == ["1.1.into"]
    _, found = rewritten(model, topology, blocks={"1": [1]})
    assert found["1.0.into"].grows and not found.trusting(topology)["1.0.into"].grows


def test_a_block_that_cannot_be_born_as_the_identity_cannot_when_numbers_shift():
    model = stack(Residual(8, 6), Gate(), Gate())
    topology = checked(model)
    (blocks,) = topology.block_lists
    assert blocks.ends[0] != ((),) == blocks.ends[1]
    _, found = rewritten(model, topology, blocks={"1": [1, 2]})
    assert found.block_lists[0].can_grow and not found.trusting(topology).block_lists[0].can_grow


def test_one_block_of_a_kind_that_cannot_be_born_as_the_identity_speaks_for_all_after_a_shift():
    model = stack(Gate(), Residual(8, 6))
    topology = checked(model)
    _, found = rewritten(model, topology, blocks={"1": [1, 0]})
    assert not found.trusting(topology).block_lists[0].can_grow  # the gate stands last now, under the other's number


def test_what_is_right_stays_right():
    model, topology = parent("faster_rcnn")
    child = Rewrite(blocks={"backbone.body.layer2": []}, keep={"rpn.head.conv.0.0": range(4)}).apply(model, topology)
    trusted, alone = read(child, like=topology, size=SIZE), read(child, size=SIZE)
    assert [group.name for group in trusted.groups] == [group.name for group in alone.groups]
    assert trusted.block_lists == alone.block_lists and trusted.followed == alone.followed
    assert all(group.grows for group in trusted.groups)


# ---- what is inside, and what is a norm


class Lean(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.layer, self.b = nn.Conv2d(8, 16, 1), layer, nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.b(self.layer(self.a(x)))


@pytest.mark.parametrize(
    ("layer", "normed"), [(nn.BatchNorm2d(16), True), (nn.GroupNorm(4, 16), True), (nn.PReLU(16), False)]
)
def test_a_norm_scales_and_shifts(layer, normed):
    model = awake(nn.Sequential(conv(3, 8), Lean(layer), nn.Conv2d(8, 2, 1)))
    topology = trace(model, X)
    assert topology.norms(topology["1.a"]) == (("1.layer",) if normed else ())
    assert (topology["1.a"] in topology.inner) is normed


def test_channels_that_gate_themselves_are_inner_and_streams_are_not():
    def gated(m: Block, x):
        y = m.norm(m.a(x))
        return m.b(y * m.up(m.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())

    layers = {"a": nn.Conv2d(8, 16, 1), "norm": nn.BatchNorm2d(16), "b": nn.Conv2d(16, 8, 1)}
    piece = Block(gated, **layers, down=nn.Conv2d(16, 4, 1), up=nn.Conv2d(4, 16, 1))
    model = awake(nn.Sequential(conv(3, 8), piece, nn.Sequential(Residual(8, 6)), nn.Conv2d(8, 2, 1)))
    topology = trace(model, X)
    inner = {group.name for group in topology.inner}
    assert topology["1.a"].makers == ("1.a", "1.up") and inner == {"1.a", "2.0.branch.0.0"}
    assert [group.name for group in topology.groups if topology.is_stream(group)] == ["1.b"]
