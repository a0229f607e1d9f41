"""Student morphism of any detector: what must not change does not, and what is dropped is the weakest."""

import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.detection.rpn import RegionProposalNetwork

from jdkd.detect import load, read, save
from jdkd.detect.input_size import input_size
from jdkd.detect.regions import region_count
from jdkd.errors import InputError
from jdkd.latency.table import regions_of
from jdkd.latency.versions import fewer_regions
from jdkd.morph import (
    Morph,
    add_block,
    can_shorten,
    change_regions,
    change_resolution,
    grow,
    rearrange,
    remove_block,
    shorten,
)
from jdkd.rewrite import Rewrite, build, mask
from jdkd.rewrite.comparison import returned_by
from tests.detectors import detector, small_spec
from tests.morph.small import DETECTORS, SIZE, parent, picture

PICTURE = ([image.double() for image in picture()],)
DEEP = [name for name in DETECTORS if name != "ssd"]  # with residual blocks


def reread(child, topology):
    return read(child, like=topology, size=SIZE)


def halved(topology):
    """Half of every group that can be cut, the first half."""
    sizes = {group.name: group.shrunk(0.5) for group in topology.groups}
    return {name: tuple(range(size)) for name, size in sizes.items() if size < topology[name].units}


def assert_same(one: nn.Module, other: nn.Module, least: int = 10) -> None:
    """What any module returns, detections among it, is the same, where it has the same shape."""
    ours, theirs, compared = returned_by(one, PICTURE), returned_by(other, PICTURE), 0
    for path in ours.keys() & theirs.keys():
        for a, b in zip(ours[path], theirs[path], strict=False):
            if a.shape == b.shape:
                compared += 1
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, float(a.abs().max())))
    assert [t.shape for t in ours[""]] == [t.shape for t in theirs[""]] and len(ours[""][0]) and compared >= least


def states_are_equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", DEEP)
def test_an_added_block_changes_no_output_and_leaves_again_as_the_weakest(name):
    model, topology = parent(name)
    for blocks in topology.block_lists:
        child = add_block(model, topology, blocks.name).apply(model, topology)
        assert sum(p.numel() for p in child.parameters()) > sum(p.numel() for p in model.parameters())
        assert_same(child, model)
        found = reread(child, topology)
        longer = next(each for each in found.block_lists if each.name == blocks.name)
        assert len(longer.blocks) == len(blocks.blocks) + 1
        assert states_are_equal(remove_block(child, found, blocks.name).apply(child, found), model)


def test_the_block_that_leaves_has_the_smallest_gamma_in_its_last_norm():
    model, topology = parent("faster_rcnn")
    name = "backbone.body.layer2"
    model = Rewrite(blocks={name: [0, 0, 0]}).apply(model, topology)
    topology = reread(model, topology)
    for place, gamma in enumerate((0.5, 0.001, 0.1), start=1):
        model.backbone.body.layer2[place].bn3.weight.data.fill_(gamma)
    model.backbone.body.layer2[2].conv3.weight.data.mul_(1e6)  # in front of a norm, whose gamma says it all
    assert remove_block(model, topology, name).rewrite.blocks == {name: (0, 2)}
    assert rearrange(model, topology, name, "backbone.body.layer3", 2).rewrite.blocks[name] == (0,)


def test_the_sums_of_a_transformers_block_speak_for_it():
    model, topology = parent("retinanet")
    model = copy.deepcopy(model)
    for block, scale in zip(model.backbone.body[3], (1.0, 0.1), strict=True):
        block.attn.proj.weight.data.mul_(scale)
    assert remove_block(model, topology, "backbone.body.3").rewrite.blocks == {"backbone.body.3": (0,)}
    model.backbone.body[3][1].mlp[3].weight.data.mul_(100)
    assert remove_block(model, topology, "backbone.body.3").rewrite.blocks == {"backbone.body.3": (1,)}, "on average"


def test_a_norm_that_cannot_learn_counts_with_the_layer_before_it():
    model, topology = parent("fcos")
    name = "backbone.body.1"
    model = Rewrite(blocks={name: [0, 0]}).apply(model, topology)
    _, first, second = model.get_submodule(name)  # the one in front changes the stride
    topology = reread(model, topology)
    second.conv3.weight.data.copy_(0.5 * first.conv3.weight)
    assert remove_block(model, topology, name).rewrite.blocks == {name: (0,)}
    second.bn3.weight.mul_(10)
    assert remove_block(model, topology, name).rewrite.blocks == {name: (1,)}


def test_a_block_of_which_nothing_is_known_leaves_last():
    model, topology = parent("pan")
    model, blocks = copy.deepcopy(model), topology.block_lists[1]
    for parameter in model.get_submodule(blocks.blocks[1]).parameters():
        parameter.data.mul_(1e3)
    stiff = replace(blocks, ends=(((),), *blocks.ends[1:]))
    topology = replace(topology, block_lists=(topology.block_lists[0], stiff, topology.block_lists[2]))
    assert remove_block(model, topology, blocks.name).rewrite.blocks == {blocks.name: (0,)}


def test_a_container_keeps_a_child():
    model, topology = parent("pan")
    child = remove_block(model, topology, "stages.0.2.blocks").apply(model, topology)
    found = reread(child, topology)
    with pytest.raises(InputError, match=r"the only block of stages\.0\.2\.blocks stays"):
        remove_block(child, found, "stages.0.2.blocks")
    emptied = remove_block(*parent("faster_rcnn"), "backbone.body.layer1")  # its first block, of another width, stays
    assert emptied.rewrite.blocks == {"backbone.body.layer1": ()}


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "pan"])
def test_blocks_that_move_arrive_as_identities(name):
    model, topology = parent(name)
    source, target = (blocks.name for blocks in topology.block_lists[1:3])
    moved = rearrange(model, topology, source, target).apply(model, topology)
    assert_same(moved, remove_block(model, topology, source).apply(model, topology))
    with pytest.raises(InputError, match="must be neighbours"):
        rearrange(model, topology, topology.block_lists[0].name, target)
    with pytest.raises(InputError, match=r"cannot move 4 block\(s\)"):
        rearrange(model, topology, source, target, 4)


def test_blocks_whose_ends_are_unknown_are_not_added():
    model, topology = parent("pan")
    name = "stages.1.2.blocks"
    stiff = copy.copy(topology.block_lists[1])
    object.__setattr__(stiff, "ends", (((),),) * 2)
    lists = (topology.block_lists[0], stiff, topology.block_lists[2])
    topology = copy.copy(topology)
    object.__setattr__(topology, "block_lists", lists)
    for act in (lambda: add_block(model, topology, name), lambda: rearrange(model, topology, lists[0].name, name)):
        with pytest.raises(InputError, match="cannot be born as the identity"):
            act()
    drawn = [grow(model, topology, random.Random(k), max_depth=9).rewrite.blocks for k in range(50)]
    assert max(len(blocks.get(name, ())) for blocks in drawn) < len(stiff.blocks)  # it may give one


@pytest.mark.parametrize("name", DETECTORS)
def test_cutting_equals_masking_over_all_that_can_be_cut(name):
    model, topology = parent(name)
    keep = halved(topology)
    assert keep.keys() == {group.name for group in topology.groups if group.size > 8}
    assert_same(Rewrite(keep=keep).apply(model, topology), mask(model, topology, keep))


@pytest.mark.parametrize("name", ["faster_rcnn", "fcos", "retinanet"])
def test_resolution_changes_only_the_input_size(name, tmp_path):
    model, topology = parent(name)
    short, long = input_size(model)
    morph = change_resolution(model, 48)
    child = morph.apply(model, topology)
    assert morph.action == f"input {short} -> 48 px" and input_size(child) == (48, round(long * 48 / short))
    assert states_are_equal(child, model) and child.architecture.id != model.architecture.id
    assert input_size(build(child.architecture)) == input_size(child)
    save(tmp_path, child)
    again = load(tmp_path)
    assert input_size(again) == input_size(child) and again.architecture == child.architecture


def test_training_sizes_follow_the_one_for_evaluation():
    model = detector(small_spec())
    model.transform.min_size = (32, 64)
    child = change_resolution(model, 96).apply(model, read(model))
    assert child.transform.min_size == (48, 96) and child.transform.max_size == 144


@pytest.mark.parametrize("name", ["ssd", "pan"])
def test_a_detector_without_an_input_size_of_its_own_keeps_it(name):
    model, _ = parent(name)
    assert input_size(model) is None
    with pytest.raises(InputError, match="48 px: it takes images as they are, or resizes them to one fixed size"):
        change_resolution(model, 48)
    with pytest.raises(InputError, match="positive whole number, got 0"):
        change_resolution(parent("fcos")[0], 0)


def test_fewer_regions_change_what_is_proposed_in_evaluation_alone(tmp_path):
    model, topology = parent("faster_rcnn")
    now, rpn = region_count(model), model.rpn
    morph = change_regions(model, now // 4)
    child = morph.apply(model, topology)
    assert morph.action == f"regions {now} -> {now // 4}" and region_count(child) == now // 4 < now == region_count(
        model
    )
    assert rpn._pre_nms_top_n["testing"] == now and child.rpn._pre_nms_top_n["testing"] == now // 4
    assert child.rpn._post_nms_top_n["training"] == rpn._post_nms_top_n["training"]
    assert states_are_equal(child, model) and child.architecture.id != model.architecture.id
    assert region_count(build(child.architecture)) == now // 4
    save(tmp_path, child)
    again = load(tmp_path)
    assert region_count(again) == now // 4 and again.architecture == child.architecture
    proposed = []
    again.rpn.register_forward_hook(lambda module, inputs, out: proposed.append(len(out[0][0])))
    again.eval()([picture()[0].to(next(again.parameters()).dtype)])
    assert 0 < proposed[0] <= now // 4


def test_regions_are_a_positive_whole_number_of_a_two_stage_detector():
    with pytest.raises(InputError, match=r"FCOS has no region proposal network of torchvision's, .* so 10 regions"):
        change_regions(parent("fcos")[0], 10)
    for wrong in (0, 2.5, True):
        with pytest.raises(InputError, match=f"regions is how many .* a positive whole number, got {wrong}"):
            change_regions(parent("faster_rcnn")[0], wrong)


class OwnCount(RegionProposalNetwork):
    """Proposes as many as it says itself, whatever its attributes say."""

    def post_nms_top_n(self) -> int:
        return 12


@pytest.mark.parametrize("kind", ["counts by itself", "counts by a table", "two of them"])
def test_regions_that_attributes_do_not_count_stay_as_many(kind):
    model = copy.deepcopy(parent("faster_rcnn")[0])
    if kind == "counts by itself":
        model.rpn.__class__ = OwnCount
    elif kind == "counts by a table":
        model.rpn._post_nms_top_n = torch.tensor([20, 10])
    else:
        model.second = copy.deepcopy(model.rpn)
    assert region_count(model) is None and regions_of(model) == 0 and fewer_regions(model) == ()
    with pytest.raises(InputError, match="several, or one that counts by itself, so 10 regions cannot be asked of it"):
        change_regions(model, 10)


@pytest.mark.parametrize("name", DEEP)
def test_growing_adds_and_moves_blocks_within_the_depth_and_repeats_from_its_seed(name):
    model, topology = parent(name)
    lists = topology.block_lists
    depth = 1 + max(len(blocks.blocks) for blocks in lists)
    drawn = [grow(model, topology, random.Random(seed), max_depth=depth) for seed in range(40)]
    assert drawn == [grow(model, topology, random.Random(seed), max_depth=depth) for seed in range(40)]
    assert {morph.action.split()[0] for morph in drawn} == ({"add", "move"} if len(lists) > 1 else {"add"})
    assert {name for morph in drawn for name in morph.rewrite.blocks} == {blocks.name for blocks in lists}
    assert max(len(order) for morph in drawn for order in morph.rewrite.blocks.values()) == depth
    with pytest.raises(InputError, match="can grow within 1 blocks; allow more depth"):
        grow(model, topology, random.Random(0), max_depth=1)


def test_no_move_grows_a_list_beyond_the_depth():
    model, topology = parent("faster_rcnn")
    model = Rewrite(blocks={"backbone.body.layer2": [0] * 4}).apply(model, topology)
    topology = reread(model, topology)
    before = {blocks.name: len(blocks.blocks) for blocks in topology.block_lists}
    for seed in range(20):
        for name, order in grow(model, topology, random.Random(seed), max_depth=2).rewrite.blocks.items():
            assert len(order) <= max(2, before[name] - 1)


def test_blocks_leave_and_the_input_shrinks_in_one_action():
    model, topology = parent("faster_rcnn")
    names = can_shorten(model, topology)[:2]
    morph = shorten(model, topology, names, 48, 9)
    regions = f"regions {region_count(model)} -> 9"
    assert len(names) == 2 and morph.rewrite.blocks.keys() == set(names)
    assert morph.action.split("; ") == [*(f"remove a block of {name}" for name in names), "input 64 -> 48 px", regions]
    child = morph.apply(model, topology)
    assert input_size(child)[0] == 48 and region_count(child) == 9
    assert shorten(model, topology).rewrite == Rewrite()


def any_action(model, topology, rng) -> Morph:
    """One action of those that the detector allows."""
    actions = [lambda: Morph("halve a group", Rewrite(keep=dict([rng.choice(sorted(halved(topology).items()))])))]
    if can_shorten(model, topology):
        actions.append(lambda: remove_block(model, topology, rng.choice(can_shorten(model, topology))))
    if any(blocks.can_grow and len(blocks.blocks) < 4 for blocks in topology.block_lists):
        actions.append(lambda: grow(model, topology, rng, max_depth=4))
    if input_size(model):
        actions.append(lambda: change_resolution(model, rng.choice((48, 64))))
    return rng.choice(actions)()


@pytest.mark.parametrize("name", DETECTORS)
def test_actions_in_succession_run_and_are_described_saved_and_loaded(name, tmp_path):
    model, topology = parent(name)
    rng = random.Random(1)
    for _ in range(2 if name == "ssd" else 5):  # of four layers
        model = any_action(model, topology, rng).apply(model, topology)
        topology = reread(model, topology)  # runs it
    save(tmp_path, model)
    again = load(tmp_path)
    assert again.architecture.id == model.architecture.id and states_are_equal(again, model)
    assert [t.tolist() for t in returned_by(again, PICTURE)[""]] == [
        t.tolist() for t in returned_by(model, PICTURE)[""]
    ]


def test_every_child_trains():
    model = detector(small_spec())
    topology, rng = read(model, check=True, size=SIZE), random.Random(0)
    target = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([1])}]
    for _ in range(6):
        model = any_action(model, topology, rng).apply(model, topology).train()
        sum(model([torch.rand(3, 64, 96)], target).values()).backward()
        assert all(p.grad is not None for p in model.parameters())
        topology = reread(model, topology)


ACTIONS = {
    "add_block": lambda model, topology: add_block(model, topology, "backbone.body.layer1"),
    "remove_block": lambda model, topology: remove_block(model, topology, "backbone.body.layer1"),
    "rearrange": lambda model, topology: rearrange(model, topology, "backbone.body.layer1", "backbone.body.layer2"),
    "grow": lambda model, topology: grow(model, topology, random.Random(0), max_depth=3),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_topology_of_another_model_is_refused_and_wrappers_are_seen_through(action):
    model, topology = parent("faster_rcnn")
    with pytest.raises(InputError, match=r"the topology was read off another model.* in this FCOS"):
        ACTIONS[action](parent("fcos")[0], topology)
    wrapped = nn.DataParallel(AveragedModel(model))
    morph = ACTIONS[action](wrapped, topology)
    assert morph == ACTIONS[action](model, topology)
    assert morph.apply(wrapped, topology).architecture == morph.apply(model, topology).architecture


def test_a_list_that_is_none_is_named():
    model, topology = parent("faster_rcnn")
    for act, name in itertools.product((add_block, remove_block), ("layer9", "")):
        with pytest.raises(InputError, match=f"'{name}' is no list of residual blocks .* backbone.body.layer1, "):
            act(model, topology, name)
    with pytest.raises(InputError, match="'x' is no list of residual blocks in this model; it has none"):
        add_block(*parent("ssd"), "x")
