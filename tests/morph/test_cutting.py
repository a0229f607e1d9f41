"""Cuts for a latency: what is least worth its time goes, and the readers of what went are repaired."""

import copy
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from jdkd.detect import read
from jdkd.detect.input_size import input_size
from jdkd.errors import InputError
from jdkd.latency import LatencyTable
from jdkd.latency.layers import positions
from jdkd.latency.table import regions_of
from jdkd.morph import channel_importance, cut_to, repair, shorten
from jdkd.morph.cutting import FLOOR, _Costs
from jdkd.rewrite import Rewrite, prune
from tests.detectors import Stage, detector, small_spec
from tests.morph.small import SIZE, parent, picture

WIDE = "backbone.fpn.layer_blocks.3.0"


@pytest.fixture(scope="module")
def model():
    return detector(small_spec(fpn=64, box_head=64))


@pytest.fixture(scope="module")
def topology(model):
    return read(model, size=SIZE)


@pytest.fixture(scope="module")
def table(model, topology):
    """Of a machine on which nothing counts but multiply-accumulates, and a tenth is fixed."""
    return priced(model, topology)


def priced(model, topology, **shares):
    """The same, but that some features of the whole detector have these shares of the latency."""
    names = positions(model, picture()[0])
    containers = tuple(dict.fromkeys(blocks.container for blocks in topology.block_lists))
    size = input_size(model)[0]
    areas = {name: (count / 4, count) for name, count in names.items()}
    regions = {
        "regions": regions_of(model),
        "of_regions": tuple(name for name in names if name.startswith("roi_heads.")),
    }
    empty = LatencyTable(containers, (size // 2, size), areas, (), **regions)
    base = empty.features(model)
    total, left = sum(base.values()), 0.9 - sum(shares.values())
    cost = {name: left * value / total for name, value in base.items()} | shares
    rows = [(base, 1.0), *(({**base, name: 0.0}, 1 - cost[name]) for name in base)]
    return replace(empty, rows=tuple(rows))


def even(topology):
    return {group.name: torch.ones(group.units) for group in topology.groups}


@pytest.mark.parametrize("criterion", ["gamma", "magnitude"])
def test_a_cut_meets_its_aim_by_no_more_than_a_step_and_keeps_the_floor(model, topology, table, criterion):
    importance = channel_importance(model, topology, criterion)
    for aim in (0.8, 0.6, 0.4):
        morph = cut_to(model, topology, table, aim, importance)
        assert 0.9 * aim < table.predict(model, topology, morph.rewrite) <= aim
        assert table.predict(morph.apply(model, topology)) == pytest.approx(
            table.predict(model, topology, morph.rewrite), rel=1e-6
        )
        for name, units in morph.rewrite.keep.items():
            group = topology[name]
            assert len(units) >= group.shrunk(FLOOR) and len(units) == group.rounded(len(units))
            gone = sorted(set(range(group.units)) - set(units))
            assert importance[name][gone].max() <= importance[name][list(units)].min()
    assert "of the channels" in morph.action


@pytest.mark.parametrize("feature", ["outputs", "layers", "regions"])
def test_a_cut_counts_what_layers_write_what_each_takes_and_regions(model, topology, feature):
    table = priced(model, topology, **{feature: 0.4})
    blocks = {path: torch.tensor([1.0]) for each in topology.block_lists for path in each.blocks}
    for how in ({}, {"regions": regions_of(model) // 2, "min_size": 48}):
        aim = 0.9 * table.predict(model, topology, shorten(model, topology, **how).rewrite)
        cut = cut_to(model, topology, table, aim, even(topology) | blocks, **how)
        assert 0.95 * aim < table.predict(model, topology, cut.rewrite) <= aim


def test_what_is_worth_little_for_its_time_goes_first(model, topology, table):
    importance = even(topology)
    dear = {name: values * (1e-4 if name == WIDE else 1.0) for name, values in importance.items()}
    assert set(cut_to(model, topology, table, 0.98, dear).rewrite.keep) == {WIDE}
    cheap = dict(importance)
    cheap.pop(WIDE)  # a group whose importance is not given stays
    assert WIDE in cut_to(model, topology, table, 0.5, importance).rewrite.keep
    assert WIDE not in cut_to(model, topology, table, 0.7, cheap).rewrite.keep


def test_the_last_channels_of_a_group_cost_more_than_the_first(model, topology, table):
    kept = cut_to(model, topology, table, 0.4, even(topology)).rewrite.keep
    shares = sorted(len(units) / topology[name].units for name, units in kept.items())
    assert FLOOR < shares[-1] < 1 and len(shares) > 1  # not one after the other to its floor


def test_chance_proposes_other_cuts_for_one_aim_and_repeats_from_its_seed(model, topology, table):
    def drawn(seed):
        rng = random.Random(seed)
        return cut_to(model, topology, table, 0.5, even(topology), temperature=1.0, rng=rng).rewrite

    proposals = [drawn(seed) for seed in range(4)]
    assert drawn(0) == proposals[0] and len({repr(each) for each in proposals}) > 1
    assert all(table.predict(model, topology, each) <= 0.5 for each in proposals)
    blocks = {path: torch.tensor([1.0]) for each in topology.block_lists for path in each.blocks}
    how = [{"temperature": 1.0, "rng": random.Random(seed)} for seed in range(8)]
    assert len({repr(cut_to(model, topology, table, 0.98, blocks, **each).rewrite) for each in how}) > 1


def test_blocks_and_input_size_save_too(model, topology, table):
    stage = "backbone.body.layer2"
    morph = cut_to(model, topology, table, 0.5, even(topology), shorter=[stage], min_size=48)
    assert morph.rewrite.blocks == {stage: ()} and input_size(morph.apply(model, topology))[0] == 48
    alone = cut_to(model, topology, table, 0.5, even(topology))

    def channels(morph):
        return sum(len(units) for units in morph.rewrite.keep.values())

    assert channels(morph) > channels(alone) or len(morph.rewrite.keep) < len(alone.rewrite.keep)
    enough = cut_to(model, topology, table, 0.9, even(topology), min_size=48)
    assert not enough.rewrite.keep and enough.action == "input 64 -> 48 px"


def test_a_block_leaves_where_it_loses_less_than_channels_for_what_it_saves(model, topology, table):
    blocks = {path: torch.tensor([1.0]) for each in topology.block_lists for path in each.blocks}
    dear = even(topology) | {path: 1e3 * value for path, value in blocks.items()}
    assert not cut_to(model, topology, table, 0.6, dear).rewrite.blocks
    cheap = even(topology) | {path: 1e-6 * value for path, value in blocks.items()}
    morph = cut_to(model, topology, table, 0.98, cheap)
    assert morph.rewrite.blocks and not morph.rewrite.keep and "remove a block of backbone.body.layer" in morph.action
    both = cut_to(model, topology, table, 0.35, cheap)
    assert len(both.rewrite.blocks) == len(topology.block_lists) and both.rewrite.keep
    child = both.apply(model, topology)
    assert 0.35 >= table.predict(child) == pytest.approx(table.predict(model, topology, both.rewrite), rel=1e-6)
    gone = [path for each in topology.block_lists for path in each.blocks]
    assert not any(name.startswith(f"{path}.") for name in both.rewrite.keep for path in gone)


def test_what_a_step_saves_beyond_the_aim_counts_for_nothing(model, topology, table):
    blocks = {path: torch.tensor([12.0]) for each in topology.block_lists for path in each.blocks}
    for importance in (even(topology), even(topology) | blocks):
        for aim in (0.98, 0.8):  # of all that is saved at once some steps lose less, and they ended at 0.91 and 0.74
            cut = cut_to(model, topology, table, aim, importance)
            assert 0.96 * aim < table.predict(model, topology, cut.rewrite) <= aim


def test_what_is_remembered_of_savings_is_what_they_would_be_anew(model, topology, table, monkeypatch):
    blocks = [path for blocks in topology.block_lists for path in blocks.blocks]
    importance = even(topology) | {path: torch.tensor([1.0]) for path in blocks}

    def cuts():
        how = {"temperature": 1.0, "floor": 0.1}
        return [cut_to(model, topology, table, 0.4, importance, **how, rng=random.Random(seed)) for seed in range(4)]

    remembered = cuts()
    for name in ("saved", "saved_without"):
        own = getattr(_Costs, name)
        monkeypatch.setattr(_Costs, name, lambda costs, *of, own=own: costs._saved.clear() or own(costs, *of))
    assert remembered == cuts() and any(cut.rewrite.blocks for cut in remembered)


def test_no_list_loses_more_than_the_floor_leaves_but_one_block_may_always_go():
    stages = [Stage(width, ((8,),) * depth) for width, depth in ((16, 2), (16, 2), (24, 7), (32, 2))]
    deep = detector(small_spec(stages=tuple(stages)))
    topology = read(deep, size=SIZE)
    table, worthless = priced(deep, topology), even(topology)
    worthless |= {path: torch.tensor([1e-9]) for each in topology.block_lists for path in each.blocks}
    orders = cut_to(deep, topology, table, 0.65, worthless, floor=0.5, shorter=["backbone.body.layer3"]).rewrite.blocks
    assert len(orders["backbone.body.layer3"]) == 3 and orders["backbone.body.layer4"] == ()


@pytest.mark.parametrize(
    ("aim", "options", "words"),
    [
        (0.05, {}, r"reaches 0\.050 of the base's latency: 0\.\d+ is the least with a floor of 0\.25"),
        (0.5, {"floor": 0.0}, r"floor 0\.0 in \(0, 1\]"),
        (-1.0, {}, r"aim -1\.0 must be above 0"),
        (0.5, {"temperature": 0.5}, "with an rng"),
        (0.5, {"shorter": ["backbone.body.layer2"] * 2}, "each once, as each loses one block"),
        (0.5, {"shorter": "backbone.body.layer2"}, r"shorter is 'backbone\.body\.layer2'; give a list"),
    ],
)
def test_what_cannot_be_met_is_refused(model, topology, table, aim, options, words):
    with pytest.raises(InputError, match=words):
        cut_to(model, topology, table, aim, even(topology), **options)
    with pytest.raises(InputError, match="read off another model"):
        cut_to(parent("fcos")[0], topology, table, 0.5, even(topology))


def test_importance_that_is_none_of_this_model_is_refused(model, topology, table):
    one = even(topology)
    name, values = next(iter(one.items()))
    for wrong in (values[:-1], -values - 1, values * math.nan, values[None]):
        with pytest.raises(InputError, match=rf"importance of {re.escape(name)} must be numbers of at least 0 for"):
            cut_to(model, topology, table, 0.9, {**one, name: wrong})
    block = topology.block_lists[0].blocks[0]
    for wrong in (torch.ones(2), torch.tensor([math.nan]), torch.tensor([-1.0])):
        with pytest.raises(InputError, match=rf"importance of {re.escape(block)} must be numbers of at least 0"):
            cut_to(model, topology, table, 0.9, {**one, block: wrong})


def repeated(model, topology, name):
    """A copy whose second half of a group's units are the first half's again, so that nothing is lost with them."""
    model, group = copy.deepcopy(model), topology[name]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    half = group.units // 2
    for slot in group.slots:
        if slot.role != "in":
            first, second = (torch.from_numpy(part.ravel()) for part in (slot.places[:half], slot.places[half:]))
            tensor = tensors[slot.tensor].data
            tensor.index_copy_(slot.dim, second, tensor.index_select(slot.dim, first))
    return model, Rewrite(keep={name: range(half)})


def activations(model, path, images):
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, out: found.append(out))
    with torch.no_grad():
        model(images)
    handle.remove()
    return found


@pytest.mark.parametrize(
    ("family", "name", "reader"),
    [
        ("faster_rcnn", "backbone.body.layer2.1.conv1", "backbone.body.layer2.1.conv2"),
        ("faster_rcnn", "backbone.body.layer3.0.downsample.0", "backbone.fpn.inner_blocks.2.0"),
        ("faster_rcnn", "roi_heads.box_head.fc6", "roi_heads.box_head.fc7"),
        ("fcos", "head.classification_head.conv.3", "head.classification_head.conv.6"),  # on every level
        ("retinanet", "backbone.fpn.inner_blocks.2.0", "backbone.fpn.layer_blocks.0.0"),
    ],
)
def test_nothing_is_lost_where_what_is_left_says_the_same(family, name, reader):
    model, topology = parent(family)
    model, rewrite = repeated(model, topology, name)
    images = [image.double() for image in picture()]
    wanted, cut, mended = (
        activations(model, reader, images),
        rewrite.apply(model, topology),
        rewrite.apply(model, topology),
    )
    before = copy.deepcopy(model.state_dict())
    repaired = repair(mended, nn.DataParallel(model), rewrite, topology, [images])
    assert reader in repaired
    for now, damaged, then in zip(
        activations(mended, reader, images), activations(cut, reader, images), wanted, strict=True
    ):
        assert (damaged - then).norm() > 0.05 * then.norm()
        assert (now - then).norm() < 0.1 * (damaged - then).norm()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_layers_after_dropped_blocks_and_at_other_sizes_are_repaired_by_their_own_past():
    model, topology = parent("faster_rcnn")
    name = "backbone.body.layer2"
    model = Rewrite(blocks={name: [0, 0, 0]}).apply(model, topology)
    topology = read(model, like=topology, size=SIZE)
    model.backbone.body.layer2[2].bn3.weight.data.fill_(0.3)
    inner = f"{name}.2.conv1"
    model, rewrite = repeated(model, topology, inner)
    rewrite = Rewrite(keep=rewrite.keep, blocks={name: (1,)}, attributes={"transform.min_size": (48,)})
    child = rewrite.apply(model, topology)
    images = [image.double() for image in picture()]
    repaired = repair(child, model, rewrite, topology, [images])
    assert repaired == [f"{name}.1.conv2"]
    assert input_size(model)[0] == 64 and input_size(child)[0] == 48, "the parent ran at the child's for a while"
    assert not any("forward" in vars(part) for part in child.children())
    smaller = Rewrite(attributes=rewrite.attributes).apply(model, topology)
    (wanted,) = activations(smaller, f"{name}.2.conv2", images)
    (now,), (cut,) = (activations(each, f"{name}.1.conv2", images) for each in (child, rewrite.apply(model, topology)))
    assert (now - wanted).norm() < 0.8 * (cut - wanted).norm(), "what it says at that size"
    half = topology[inner].units // 2
    now, then = child.get_submodule(f"{name}.1.conv2").weight, model.get_submodule(f"{name}.2.conv2").weight
    assert (now - then[:, :half]).norm() > 0.1 * then.norm()


def test_heads_that_read_nothing_that_was_cut_do_not_run():
    model, topology = parent("faster_rcnn")
    model, rewrite = repeated(model, topology, "backbone.body.layer2.1.conv1")
    child, images = rewrite.apply(model, topology), [image.double() for image in picture()]

    def heads(module, inputs):
        raise AssertionError("a head ran")

    for each in (model, child):
        each.rpn.register_forward_pre_hook(heads)
    assert repair(child, model, rewrite, topology, [images]) == ["backbone.body.layer2.1.conv2"]


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019): its outputs are no product of its weights."""

    def forward(self, x):
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / spread, self.bias)


def test_layers_whose_outputs_are_no_product_of_their_weights_keep_these():
    model, topology = copy.deepcopy(parent("ssd"))
    model.backbone.features[2].__class__ = Standardised
    del model.architecture  # whose builder makes plain convolutions
    rewrite = Rewrite(keep={"backbone.features.0": range(8)})
    child = rewrite.apply(model, topology)
    before = copy.deepcopy(child.state_dict())
    assert repair(child, model, rewrite, topology, [[picture()[0].double()]]) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in child.state_dict().items())


def test_repair_needs_images_and_leaves_what_was_not_cut():
    model, topology = parent("ssd")
    rewrite = Rewrite(keep={"backbone.features.0": range(8)})
    child = rewrite.apply(model, topology)
    with pytest.raises(InputError, match="repair was given 0 batches"):
        repair(child, model, rewrite, topology, [])
    assert repair(child, model, rewrite, topology, [[picture()[0].double()]]) == ["backbone.features.2"]
    plain, twice = prune(model, topology, rewrite.keep), rewrite.apply(model, topology)
    repair(twice, model, rewrite, topology, [[picture()[0].double()]] * 2)
    now, then = (each.get_submodule("backbone.features.2").weight for each in (twice, child))
    torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-9, msg="of more places the ridge is as much more")
    nothing = rewrite.apply(model, topology)
    repair(nothing, model, rewrite, topology, [[picture()[0].double() * math.inf]])
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in nothing.state_dict().items())
    changed = {key for key, tensor in child.state_dict().items() if not torch.equal(tensor, plain.state_dict()[key])}
    assert changed == {"backbone.features.2.weight", "backbone.features.2.bias"}
