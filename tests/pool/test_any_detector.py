"""Pools of detectors that nobody declared: one-stage and two-stage, of convolutions and transformers, and a PAN."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from jdkd.notices import Notice
from jdkd.pool import Phase, PoolTrainConfig, Space, Supernet, grow_base, load_pool, train_pool
from jdkd.pool.growing import _say_what_is_rigid
from jdkd.pool.stages import read_stages
from jdkd.rewrite import Architecture, build, describe
from jdkd.rewrite.trial import returned_by
from jdkd.train import TrainConfig
from tests.graph.networks import pan_detector
from tests.morph.small import parent, picture

NAMES = ("fcos", "retinanet", "pan")
PICTURE = ([image.double() for image in picture()],)


def supernet_of(name: str) -> Supernet:
    """A pool of a detector at birth, with something in the weights that read what is new."""
    model, topology = parent(name)
    space = Space.from_base(topology)
    largest, found = grow_base(model, topology, space)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in largest.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator), alpha=0.01)
    return Supernet(space, largest, found)


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """What any module of both returns is the same, where it has the same shape."""
    ours, theirs, compared = returned_by(one, PICTURE), returned_by(other, PICTURE), 0
    for path in ours.keys() & theirs.keys():
        for a, b in zip(ours[path], theirs[path], strict=True):
            if a.shape == b.shape:
                compared += 1
                largest = float(a.abs().max()) if a.numel() else 0.0
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, largest))
    assert [t.shape for t in ours[""]] == [t.shape for t in theirs[""]] and compared > 20


@pytest.mark.parametrize("name", NAMES)
def test_growth_changes_no_output(name):
    model, topology = parent(name)
    space = Space.from_base(topology)
    largest, found = grow_base(model, topology, space)
    assert_same(largest, model)
    assert [len(blocks.blocks) for blocks in found.block_lists] == [choices[-1] for choices in space.depths]
    assert any(found[group.name].units > group.units for group in topology.inner)
    assert list(map(len, found.followed)) == list(map(len, topology.followed))


@pytest.mark.parametrize("name", NAMES)
def test_a_subnet_in_place_equals_its_extraction(name):
    supernet = supernet_of(name)
    space = supernet.space
    for subnet in (space.smallest, space.sample(random.Random(1))):
        supernet.activate(subnet)
        alone = supernet.extract(subnet)
        assert_same(alone, supernet.model)
        known = alone.architecture
        assert describe(alone, known.builder, known.arguments) == known
        shapes = {name: tensor.shape for name, tensor in alone.state_dict().items()}
        assert {name: tensor.shape for name, tensor in build(known, "meta").state_dict().items()} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_sorting_changes_no_output_but_those_of_subnets(name):
    supernet = supernet_of(name)
    narrow = supernet.space.smallest
    whole, before = copy.deepcopy(supernet.model), supernet.extract(narrow)
    supernet.sort_channels()
    ours, theirs = (returned_by(model, PICTURE)[""] for model in (supernet.model, whole))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    state, other = before.state_dict(), supernet.extract(narrow).state_dict()
    assert any(not torch.equal(state[name], other[name]) for name in state)


def test_channels_in_front_of_a_list_belong_to_its_stage_and_heads_to_the_last():
    _, topology = parent("fcos")
    (stage,) = read_stages(topology, {group.name for group in topology.inner})
    assert {group.name for group in stage.groups} == {group.name for group in topology.inner}
    _, topology = parent("pan")
    stages = read_stages(topology, {group.name for group in topology.groups})
    members = [{group.name for group in stage.groups} for stage in stages]
    assert sum(map(len, members)) == len(topology.groups)
    for number, blocks in enumerate(topology.block_lists):
        inside = {group.name for group in topology.groups if group.name.startswith(f"{blocks.name}.")}
        assert inside and inside <= members[number]
    assert "stem.0" in members[0] and any(name.startswith("tower.") for name in members[2])


def test_widths_are_multiples_of_eight_channels_where_a_group_has_so_many():
    _, topology = parent("fcos")
    for group in topology.groups:
        each, units = group.size // group.units, group.rounded(0.7 * group.units)
        assert units >= 1 and (units * each % 8 == 0 or group.size < 8 or 8 % each)
        assert abs(units - 0.7 * group.units) * each <= 8


def test_a_list_whose_blocks_cannot_be_born_as_the_identity_stays_as_deep():
    model, topology = parent("pan")
    first, *others = topology.block_lists
    stiff = replace(topology, block_lists=(replace(first, ends=(((),),) * len(first.blocks)), *others))
    space = Space.from_base(stiff)
    assert space.depths == ((2,), *((2, 3),) * len(others))
    largest, _ = grow_base(model, stiff, space)
    assert len(largest.get_submodule(first.container)) == len(model.get_submodule(first.container))


def test_pyramid_channels_are_the_same_for_all_teachers():
    supernet = supernet_of("pan")
    followed = {unit[0] for level in supernet.topology.followed for unit in level}
    elastic = {group.name for stage in supernet.stages for group in stage.groups}
    assert followed and not followed & elastic and elastic


CONFIG = PoolTrainConfig(
    TrainConfig(steps=6, batch_size=2, lr=1e-4),
    phases=(Phase("largest", 1 / 3, 0.0, 0, 1.0), Phase("full", 2 / 3, 1.0, 1, 0.5)),
)


def test_a_detector_that_nobody_declared_gets_a_pool(digits, tmp_path):
    train, selection = digits
    base = pan_detector(classes=len(train.classes))
    base.architecture = Architecture("tests.graph.networks:pan_detector", {"classes": len(train.classes)})
    rigid = pytest.warns(Notice, match=r"one width in neck\.top_down\.0\.0: other channels stand beside it")
    with rigid, pytest.warns(Notice, match="subnets learn from features alone"):
        pool = train_pool(base, train, selection, CONFIG, tmp_path, scored=2)
    read = load_pool(tmp_path, base, train)
    assert read.members == pool.members and len({member.parameters for member in read.members}) == 2
    ours, theirs = (each.teacher(each.members[0].teacher).state_dict() for each in (pool, read))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_detector_in_which_nothing_can_change_has_a_pool_of_one_and_is_told():
    model, topology = parent("ssd")
    space = Space.from_base(topology)
    supernet = Supernet(space, *grow_base(model, topology, space))
    with pytest.warns(Notice, match="the teacher pool holds one teacher"):
        _say_what_is_rigid(supernet)
    assert space.largest == space.smallest == space.mutate(space.largest, random.Random(0))
    assert_same(supernet.extract(space.largest), model)
