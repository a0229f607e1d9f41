"""What one forward tells of how channels are coupled."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from jdkd.errors import InputError
from jdkd.graph import ChannelGroup, Declaration, Slot, report, trace
from jdkd.rewrite import mask, prune, verify
from tests.graph.networks import CrossStage, PANDetector, Residual, SqueezeExcite, awake, conv

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IMAGES = [torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(k)) for k in range(2)]
TARGETS = [{"boxes": torch.tensor([[4.0, 6, 20, 30], [2, 2, 40, 30]]), "labels": torch.tensor([1, 3])}] * 2


class Net(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x):
        return self.run(self, *x)


def slots(group):
    return {(slot.tensor, slot.dim, slot.role, slot.offset, slot.repeat) for slot in group.slots}


def test_a_convolution_its_norm_and_its_reader_are_one_group():
    model = Net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8), b=nn.Conv2d(8, 5, 1))
    (group,) = trace(model, X).groups
    norm = {(f"n.{name}", 0, "scale", 0, 1) for name in ("weight", "bias", "running_mean", "running_var")}
    expected = {("a.weight", 0, "out", 0, 1), ("a.bias", 0, "scale", 0, 1), ("b.weight", 1, "in", 0, 1)} | norm
    assert (group.name, group.units, slots(group)) == ("a", 8, expected)


def test_a_sum_makes_one_group_of_its_terms():
    model = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))
    (group,) = trace(model, X).groups
    assert {slot.tensor for slot in group.slots if slot.role == "out"} == {"a.weight", "b.weight"}


def test_a_concatenation_puts_groups_side_by_side():
    model = Net(
        lambda m, x: m.c(torch.cat((m.a(x), m.b(x)), 1)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 6, 1),
        c=nn.Conv2d(14, 2, 1),
    )
    found = {group.name: slots(group) for group in trace(model, X).groups}
    assert ("c.weight", 1, "in", 0, 1) in found["a"] and ("c.weight", 1, "in", 8, 1) in found["b"]


def test_groups_of_one_layer_are_told_apart_and_what_nobody_reads_is_said():
    def parted(m, x):
        one, other = m.a(x).split([3, 5], 1)
        m.unread(x).relu()
        return m.b(one), m.c(other)

    layers = {"b": nn.Conv2d(3, 2, 1), "c": nn.Conv2d(5, 2, 1), "unread": nn.Conv2d(3, 4, 1)}
    topology = trace(Net(parted, a=nn.Conv2d(3, 8, 1), **layers), X)
    assert {group.name: group.units for group in topology.groups} == {"a": 3, "a#2": 5}
    (unread,) = [frozen for frozen in topology.frozen if ("unread.weight", 0) in frozen.tensors]
    assert unread.reason == "nothing in the model reads it"


def test_channels_that_the_model_returns_stay_though_they_are_read_too():
    model = Net(lambda m, x: (y := m.a(x), m.b(y)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    topology = trace(model, X)
    assert not topology.groups
    assert [each.reason for each in topology.frozen if ("b.weight", 1) in each.tensors] == ["the model returns it"]


def test_a_level_of_one_channel_is_followed_as_one_of_which_nothing_is_known():
    neck = Net(lambda m, x: [m.a(x), m.b(x)], a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(3, 8, 1))
    model = Net(lambda m, x: m.head(m.neck(x)[1]), neck=neck, head=nn.Conv2d(8, 2, 1))
    assert list(map(len, trace(model, X, follow="neck").followed)) == [0, 8]


def blocks_of(*layers, forward=None):
    container = nn.Sequential(*layers) if forward is None else nn.ModuleList(layers)
    model = Net(forward or (lambda m, x: m.out(m.list(m.a(x)))), a=nn.Conv2d(3, 8, 1), list=container)
    model.out = nn.Conv2d(8 if forward is None else 16, 2, 1)
    return [blocks.blocks for blocks in trace(awake(model), X).block_lists]


def test_blocks_side_by_side_in_one_stream_are_a_list_and_no_others():
    def changed(m, x):
        return m.b(x + m.a(x))  # a sum with its input, in other channels

    def branches(m, x):
        return m.out(torch.cat((m.list[0](m.a(x)), m.list[1](m.a(x).flip(1))), 1))

    two = Residual(8, 6), Residual(8, 4)
    assert blocks_of(*two) == [("list.0", "list.1")]
    for between in (conv(8, 8), nn.ReLU()):
        assert blocks_of(two[0], between, two[1]) == [("list.0",), ("list.2",)]
    assert blocks_of(Net(changed, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))) == []
    assert blocks_of(*two, forward=branches) == [("list.0",), ("list.1",)]


def test_a_flattened_map_repeats_its_channels():
    model = Net(
        lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 7).flatten(1)), a=nn.Conv2d(3, 8, 1), b=nn.Linear(392, 4)
    )
    (group,) = trace(model, X).groups
    assert ("b.weight", 1, "in", 0, 49) in slots(group) and group.units == 8


def test_norm_groups_and_grouped_convolutions_go_as_a_whole():
    model = Net(
        lambda m, x: m.c(m.b(m.n(m.a(x)))),
        a=nn.Conv2d(3, 24, 1), n=nn.GroupNorm(6, 24), b=nn.Conv2d(24, 12, 3, groups=4), c=nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    (group,) = trace(model, X).groups  # 6 norm groups of 4 and 4 groups of 6: the least that both allow is 12 channels
    assert group.units == 2 and {s.tensor: s.repeat for s in group.slots if s.role != "in"}["b.weight"] == 6
    cut = prune(model, trace(model, X), {group.name: [1]})
    assert (cut.n.num_groups, cut.b.groups, cut.b.in_channels, cut.b.out_channels) == (3, 2, 12, 6)
    masked = mask(model, trace(model, X), {group.name: [1]})
    torch.testing.assert_close(cut(X), masked(X))


@pytest.mark.parametrize(
    ("units", "each", "rounded", "shrunk"),
    [
        (32, 1, {20: 24, 19.9: 16, 1: 8}, {0.25: 8, 0.7: 24, 1.0: 32}),
        (12, 1, {6: 8, 1: 8, 12: 16}, {0.5: 8, 1.0: 12}),  # no more than there are
        (8, 1, {4: 8}, {0.5: 8, 0.1: 8}),  # 8 channels and fewer stay whole
        (6, 4, {3: 4, 2.9: 2, 1: 2}, {0.5: 4, 0.1: 2}),  # two units make eight channels
        (4, 16, {2.4: 2, 0.1: 1}, {0.6: 2, 0.01: 1}),
        (3, 5, {2.1: 2, 0.4: 1}, {0.7: 2, 0.01: 1}),  # no number of these makes a multiple of eight
    ],
)
def test_units_are_rounded_to_multiples_of_eight_channels_where_there_are_so_many(units, each, rounded, shrunk):
    group = ChannelGroup("a", units, (Slot("a.weight", 0, "out", np.arange(units * each).reshape(units, each)),))
    assert {wanted: group.rounded(wanted) for wanted in rounded} == rounded
    assert {share: group.shrunk(share) for share in shrunk} == shrunk


def test_a_head_that_runs_on_many_levels_is_one_group_with_their_makers():
    model = Net(
        lambda m, x: [m.head(level) for level in (m.a(x), m.b(F.max_pool2d(x, 2)))],
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    (group,) = trace(model, X).groups
    assert {slot.tensor for slot in group.slots if slot.role == "out"} == {"a.weight", "b.weight"}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_regions_written_to_their_places_bring_their_channels(count):
    def pooled(m, x):
        made = torch.zeros(3, 8, 16, 16)
        made[torch.arange(count)] = m.a(x)[:count]  # torch drops the first dimension where it is 1
        made[torch.arange(count, 3)] = m.b(x)[:1].expand(3 - count, -1, -1, -1)
        return m.c(made)

    model = Net(pooled, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))
    (group,) = trace(model, X).groups
    assert group.makers == ("a", "b")


@pytest.mark.parametrize(
    ("mixing", "reason"),
    [
        (lambda x: x.mean(1, keepdim=True) + x, "aten::mean"),
        (lambda x: x.softmax(1), "aten::_softmax"),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), "aten::native_layer_norm"),
        (lambda x: x * torch.arange(8.0)[:, None, None], "aten::mul meets a tensor of 8 values"),
        (lambda x: torch.ops.jdkd_tests.twice(x), "jdkd_tests::twice is not an operator that is known"),
        (lambda x: x[:, torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])], "aten::index"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), "aten::constant_pad_nd"),
        (lambda x: torch.cumsum(x, 1), "aten::cumsum"),
        (lambda x: F.normalize(x, dim=1), "aten::linalg_vector_norm"),
        (lambda x: F.max_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0], "max_pool3d"),
    ],
)
def test_what_mixes_channels_freezes_them_and_is_named(mixing, reason):
    model = Net(lambda m, x: m.c(m.b(mixing(m.a(x)))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1))
    topology = trace(model, X)
    assert [group.name for group in topology.groups] == ["b"]
    (frozen,) = [frozen for frozen in topology.frozen if ("a.weight", 0) in frozen.tensors]
    assert reason in frozen.reason


def normed(norm):
    return Net(
        lambda m, x: m.c(m.n(m.a(x).movedim(1, -1)).movedim(-1, 1) if norm is nn.LayerNorm else m.n(m.a(x))),
        a=nn.Conv2d(3, 8, 1),
        n=nn.LayerNorm(8) if norm is nn.LayerNorm else norm(4, 8),
        c=nn.Conv2d(8, 2, 1),
    )


def shifted(register):
    model = Net(lambda m, x: m.c(m.a(x) + m.shift), a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))
    shift = torch.arange(8.0).view(8, 1, 1)
    model.register_buffer("shift", shift) if register else setattr(model, "shift", shift)
    return model


def doubled():
    return Net(lambda m, x: m.c(torch.ops.jdkd_tests.twice(m.a(x))), a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize(
    ("stuck", "words", "freed", "declared"),
    [
        (normed(nn.LayerNorm), "in n; with fewer the others would change; a batch norm, or a group norm of several",
         normed(nn.GroupNorm), None),
        (shifted(False), "if there is one for each channel, make it a parameter or buffer of the model", shifted(True),
         None),
        (doubled(), "jdkd.graph.Declaration(operators={'jdkd_tests::twice': ...}) can say what it does", doubled(),
         Declaration(operators={"jdkd_tests::twice": "pointwise"})),
    ],
)  # fmt: skip
def test_doing_what_a_reason_says_frees_the_channels(stuck, words, freed, declared):
    topology = trace(stuck, X)
    assert not topology.groups and any(words in frozen.reason for frozen in topology.frozen)
    assert [group.name for group in trace(freed, X, declared=declared).groups] == ["a"]


def test_numbers_that_code_holds_on_to_are_found_by_comparing():
    model = Net(lambda m, x: m.c(m.a(x).view(2, 8, -1).view(2, 8, 16, 16)), a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))
    topology = verify(model, trace(model, X), X)
    assert not topology.groups and any("invalid for input of size" in frozen.reason for frozen in topology.frozen)


def test_what_the_model_does_outside_of_torch_is_found_by_comparing():
    def outside(m, x):
        made = m.a(x)
        return m.c(torch.from_numpy(made.detach().numpy()[:, ::-1].copy()))

    model = Net(outside, a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 2, 1))
    assert not verify(model, trace(model, X), X).groups


def test_a_trace_leaves_the_model_as_it_was():
    model = awake(PANDetector())
    model.train()
    model.tower.eval()
    modes, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, IMAGES)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fails_is_left_without_hooks():
    model = Net(lambda m, x: m.a(x), a=nn.Conv2d(3, 8, 1))
    with pytest.raises(RuntimeError):
        trace(model, torch.rand(1, 5, 4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(conv(3, 8), SqueezeExcite(8), nn.Conv2d(8, 2, 1)),
        nn.Sequential(conv(3, 8), Residual(8, 6), Residual(8, 6), nn.Conv2d(8, 2, 1)),
        nn.Sequential(conv(3, 8), CrossStage(8), nn.Conv2d(8, 2, 1)),
        nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.PReLU(8), nn.Conv2d(8, 2, 1)),
        nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.Conv2d(8, 2, 1)),
        nn.Sequential(conv(3, 8), nn.PixelShuffle(2), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)),
        nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 2, 1)),
        nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.Conv2d(8, 2, 1)),
    ],
    ids=[
        "squeeze",
        "residual",
        "csp",
        "depthwise",
        "transposed",
        "transposed depthwise",
        "pixels",
        "instance",
        "shuffle",
    ],
)
def test_cut_and_masked_agree_in_every_group(model):
    topology = trace(awake(model), X)
    assert topology.groups and verify(model, topology, X).groups == topology.groups


def test_a_detector_that_nobody_declared_can_be_cut():
    model = awake(PANDetector())
    topology = trace(model, IMAGES)
    checked = verify(model, topology, IMAGES)
    assert checked.groups == topology.groups and checked.prunable_share() > 0.99
    assert {len(blocks.blocks) for blocks in topology.block_lists} == {2} and len(topology.block_lists) == 3
    keep = {group.name: range(max(1, round(0.7 * group.units))) for group in topology.groups}
    cut = prune(model, topology, keep)
    assert sum(p.numel() for p in cut.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    sum(cut.train()(IMAGES, TARGETS).values()).backward()
    assert all(p.grad is not None for p in cut.parameters())


def test_an_unknown_operator_is_refused_in_part_and_the_rest_can_be_cut():
    model = awake(PANDetector(custom=True))
    topology = verify(model, trace(model, IMAGES), IMAGES)
    assert list(topology.unknown) == ["jdkd_tests::twice"]
    frozen = [frozen for frozen in topology.frozen if "jdkd_tests::twice" in frozen.reason]
    assert frozen and ("neck.lateral.2.weight", 0) in frozen[0].tensors
    assert "stem.0" in [group.name for group in topology.groups]


def test_a_declaration_says_what_an_operator_does():
    model = awake(PANDetector(custom=True))
    topology = trace(model, IMAGES, declared=Declaration(operators={"jdkd_tests::twice": "pointwise"}))
    assert not topology.unknown and topology.prunable_share() > 0.99
    assert verify(model, topology, IMAGES).groups == topology.groups


def test_a_declaration_freezes_and_couples():
    layers = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 8, 1), "d": nn.Conv2d(8, 2, 1)}
    model = Net(lambda m, x: m.d(m.c(m.b(m.a(x)))), **layers)
    declared = Declaration(frozen=(("a.weight", 0),), coupled=((("b.weight", 0), ("c.weight", 0)),))
    topology = trace(model, X, declared=declared)
    assert [group.name for group in topology.groups] == ["b"] and len(topology["b"].slots) == 6
    assert any("declared" in frozen.reason for frozen in topology.frozen)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"operators": {"a::b": "magic"}}, "'a::b' is declared 'magic'; say one of pointwise, spatial, same"),
        ({"frozen": (("a.wait", 0),)}, "dimension 0 of 'a.wait' is declared"),
        ({"coupled": ((("0.weight", 0), ("1.weight", 0)),)}, "has 8 channels and .* has 2"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(declared, message):
    with pytest.raises(InputError, match=message):
        trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), X, declared=Declaration(**declared))


def test_a_report_names_what_can_be_cut_and_what_cannot_and_why():
    topology = trace(awake(PANDetector(custom=True)), IMAGES)
    console = Console(width=200, file=io.StringIO())
    console.print(report(topology))
    text = console.file.getvalue()
    for words in ("stem.0", "stages.0.2.blocks", "jdkd_tests::twice is not an operator that is known", "can be cut"):
        assert words in text
    content = json.loads(topology.to_json())
    assert content["groups"][0]["slots"][0]["offset"] == 0 and content["unknown"]


def test_a_view_of_nothing_leaves_open_what_became_of_its_channels():
    model = Net(lambda m, x: m.b(m.a(x[:0])).reshape(-1, 4), a=nn.Linear(6, 8), b=nn.Linear(8, 12))
    assert [group.name for group in trace(model, torch.rand(2, 6)).groups] == ["a"]
