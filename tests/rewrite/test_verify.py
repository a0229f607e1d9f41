"""Errors planted in a topology, each of which comparing must find; and what comparing costs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import Topology, trace
from jdkd.rewrite import verify
from jdkd.rewrite.comparison import difference, returned_by
from tests.detectors import detector, small_spec
from tests.graph.networks import Residual, awake, conv, pan_detector
from tests.rewrite.blocks import Block

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IMAGES = [torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(2))]


def residual() -> nn.Module:
    blocks = nn.Sequential(Residual(8, 6), Residual(8, 6))
    return awake(nn.Sequential(conv(3, 8), blocks, conv(8, 10), nn.Conv2d(10, 2, 1)))


def with_slots(topology: Topology, name: str, change) -> Topology:
    """With the slots of one group changed."""
    group = topology[name]
    changed = replace(group, slots=tuple(filter(None, map(change, group.slots))))
    return replace(topology, groups=tuple(changed if each is group else each for each in topology.groups))


def shifted(slot):
    """One place to the right, around the end."""
    return replace(slot, places=(slot.places + 1) % slot.places.size) if slot.role == "in" else slot


def without_reader(slot):
    return None if slot.tensor == "1.0.branch.0.0.weight" else slot


def without_norm(slot):
    return None if slot.role == "scale" else slot


@pytest.mark.parametrize("change", [shifted, without_reader, without_norm])
def test_a_group_with_a_wrong_slot_is_frozen_and_no_other(change):
    model = residual()
    topology = with_slots(trace(model, X), "0.0", change)
    checked = verify(model, topology, X)
    assert {group.name for group in topology.groups} - {group.name for group in checked.groups} == {"0.0"}
    (reason,) = (frozen.reason for frozen in checked.frozen if ("0.0.weight", 0) in frozen.tensors)
    assert "disagree" in reason and "look in the model's code for numbers" in reason


@pytest.mark.parametrize("place", range(4))
def test_one_wrong_group_among_many_is_found_wherever_it_stands(place):
    model = awake(pan_detector())
    topology = trace(model, IMAGES)
    group = topology.groups[place * (len(topology.groups) - 1) // 3]
    checked = verify(model, with_slots(topology, group.name, shifted), IMAGES)
    assert [each.name for each in topology.groups if each is not group] == [each.name for each in checked.groups]


def test_two_groups_that_are_one_are_found_together():
    model = residual()
    topology = trace(model, X)
    stream = topology["0.0"]
    parts = [[slot for slot in stream.slots if slot.tensor.startswith(name)] for name in ("0", "1.0", "1.1", "2")]
    # the stream is said to end after the first block, although the second adds to it
    halves = (
        replace(stream, slots=tuple(parts[0] + parts[1])),
        replace(stream, name="planted", slots=tuple(parts[2] + parts[3])),
    )
    groups = tuple(group for group in topology.groups if group is not stream)
    checked = verify(model, replace(topology, groups=(*groups, *halves)), X)
    assert [group.name for group in checked.groups] == [group.name for group in groups]


def test_groups_that_fit_only_while_they_are_of_one_size_are_found():
    def sized(m, x):
        made = m.a(x)
        return m.c(made), m.d(m.b(x)[:, : made.shape[1]])  # a number to the trace, which couples nothing

    layers = {"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(3, 16, 1), "c": nn.Conv2d(16, 2, 1), "d": nn.Conv2d(16, 2, 1)}
    model = awake(Block(sized, **layers))
    topology = trace(model, X)
    assert {group.name for group in topology.groups} == {"a", "b"}
    assert "a" not in {group.name for group in verify(model, topology, X).groups}


def test_a_place_that_code_holds_on_to_is_found_though_leading_units_would_agree():
    def fourth(m, x):
        made = m.a(x)
        return m.b(made), m.c(made[:, 3:4])

    model = awake(Block(fourth, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(16, 2, 1), c=nn.Conv2d(1, 2, 1)))
    topology = trace(model, X)
    group = next(group for group in topology.groups if group.units > 1)
    assert group.name not in {each.name for each in verify(model, topology, X).groups}


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_every_tensor_that_a_module_returns_counts(factor):
    one, other = (Block(lambda m, x: (x * m.factor, x)) for _ in range(2))
    one.factor, other.factor = 1.0, factor
    assert difference(returned_by(one, (X,)), one, (X,)) is None
    assert "the model differs by" in difference(returned_by(one, (X,)), other, (X,))


@pytest.mark.parametrize(
    ("path", "end"),
    [("1.0", "1.0.branch.0.0"), ("1.0", "1.1.norm"), ("1.1", "+1.1.norm.bias"), ("1.0", "1.0.branch.1")],
    ids=["an inner layer", "another block's", "an offset", "before a norm"],
)
def test_an_end_that_does_not_silence_its_block_is_taken_away(path, end):
    model = residual()
    topology = trace(model, X)
    (blocks,) = topology.block_lists
    ends = tuple(((end,),) if each == path else made for each, made in zip(blocks.blocks, blocks.ends, strict=True))
    (checked,) = verify(model, replace(topology, block_lists=(replace(blocks, ends=ends),)), X).block_lists
    assert [bool(all(made)) for made in checked.ends] == [each != path for each in checked.blocks]


def test_a_group_whose_places_stand_in_code_is_cut_but_does_not_grow():
    def newest(m, x):  # the ghost of a map fills what is missing of eight channels
        made = m.a(x)
        return m.b(torch.cat((made, m.cheap(made)), 1)[:, :8])

    model = awake(
        nn.Sequential(
            conv(3, 8),
            Block(newest, a=conv(8, 4), cheap=conv(4, 4, groups=4), b=nn.Conv2d(8, 6, 1)),
            nn.Conv2d(6, 2, 1),
        )
    )
    topology = verify(model, trace(model, X), X)
    assert {group.name: group.grows for group in topology.groups} == {"0.0": True, "1.a.0": False, "1.b": True}


def test_a_sound_model_runs_eight_times():
    """With drawn weights, as it is compared, cut, masked and grown; without blocks, with idle ones, and with copies."""
    runs = []
    model = residual()
    topology = trace(model, X)
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    verify(model, topology, X)
    assert len(runs) == 8


def test_a_detector_is_read_with_few_regions_and_keeps_its_settings():
    model = detector(small_spec())
    before = model.roi_heads.detections_per_img, dict(model.rpn._post_nms_top_n), model.transform.min_size
    seen = []
    model.roi_heads.box_head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    read(model, check=True)
    assert max(seen) <= 64
    model.rpn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(InputError, match="division by zero"):
        read(model)
    assert before == (model.roi_heads.detections_per_img, model.rpn._post_nms_top_n, model.transform.min_size)
