"""Student morphism: what must not change does not, and what is dropped is the weakest."""

import random

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18

from jdkd.errors import InputError
from jdkd.morph import add_block, change_resolution, draw, prune_channels, rearrange, remove_block
from tests.detectors import assert_same, detector, masked, outputs, small_spec


@pytest.fixture(params=["basic", "bottleneck"])
def parent(request):
    return detector(small_spec(request.param))


def set_gamma(model, stage, block, value, norm=None):
    block = getattr(model.backbone.body, f"layer{stage + 1}")[block]
    getattr(block, f"bn{norm or block.depth}").weight.data.fill_(value)


def test_adding_a_block_changes_no_output(parent):
    child = add_block(parent, 2).apply(parent)
    assert child.spec.depths == (2, 2, 3, 2)
    assert_same(outputs(child), outputs(parent))


def test_removing_takes_the_block_with_the_smallest_gamma_but_never_the_first(parent):
    parent = add_block(parent, 1).apply(parent)
    for block, gamma in enumerate((0.001, 0.5, 0.1)):
        set_gamma(parent, 1, block, gamma)
    morph = remove_block(parent, 1)
    assert morph.blocks[1] == (0, 1)
    child = morph.apply(parent)
    assert torch.equal(child.backbone.body.layer2[1].conv1.weight, parent.backbone.body.layer2[1].conv1.weight)


def test_removing_a_block_that_does_nothing_changes_no_output(parent):
    grown = add_block(parent, 0).apply(parent)
    assert_same(outputs(remove_block(grown, 0).apply(grown)), outputs(parent))


def test_the_only_block_of_a_stage_stays(parent):
    child = remove_block(parent, 3).apply(parent)
    with pytest.raises(InputError, match="stage 4 has 1 block"):
        remove_block(child, 3)


def test_rearranging_moves_depth_between_neighbours(parent):
    child = rearrange(parent, 1, 2).apply(parent)
    assert child.spec.depths == (2, 1, 3, 2)
    assert_same(outputs(child), outputs(remove_block(parent, 1).apply(parent)))  # what arrives is the identity
    with pytest.raises(InputError, match="neighbours"):
        rearrange(parent, 0, 2)
    with pytest.raises(InputError, match="cannot move 2"):
        rearrange(parent, 0, 1, count=2)


def test_pruning_drops_the_channels_with_the_smallest_gamma(parent):
    block = parent.backbone.body.layer2[1]
    number = len(parent.spec.stages[1].blocks[1])
    width = parent.spec.stages[1].blocks[1][0]
    for name, module in parent.backbone.body.named_modules():
        if name.rpartition(".")[2].startswith("bn"):
            module.weight.data.fill_(1.0)
    block.bn1.weight.data[: width // 2] = 1e-3
    morph = prune_channels(parent, 0.05)
    assert set(morph.channels) == {"layer2.1.inner1"}
    assert morph.channels["layer2.1.inner1"] == tuple(range(width // 2, width))
    assert morph.spec.stages[1].blocks[1][0] == width // 2 and number == len(morph.spec.stages[1].blocks[1])


def test_pruning_equals_masking_over_all_groups_at_once(parent):
    morph = prune_channels(parent, 0.5, fpn=0.5, box_head=0.5)
    assert {"fpn", "fpn.top_down", "rpn", "box_head.fc6", "box_head.fc7"} < set(morph.channels)
    child = outputs(morph.apply(parent))
    for group, kept in morph.channels.items():
        masked(parent, group, list(kept))
    assert_same(child, outputs(parent))


def test_pruning_keeps_multiples_of_eight_and_a_quarter():
    spec = small_spec()
    parent = detector(spec.replace(fpn=64))
    morph = prune_channels(parent, 0.9, fpn=0.9)
    assert morph.spec.fpn == 16
    assert all(width % 8 == 0 for stage in morph.spec.stages for block in stage.blocks for width in block)
    with pytest.raises(InputError, match="changes nothing"):
        prune_channels(detector(small_spec()), 0.0, box_head=0.01)
    with pytest.raises(InputError, match=r"fpn is the share.*1\.0"):
        prune_channels(parent, 0.1, fpn=1.0)


def test_resolution_changes_only_the_input_size(parent):
    child = change_resolution(parent, 48).apply(parent)
    assert (child.transform.min_size, child.transform.max_size) == ((48,), 72)
    assert_same(outputs(child), outputs(parent))


def test_drawing_reaches_every_action_and_repeats_from_its_seed():
    parent = detector(small_spec())
    drawn = [draw(parent, random.Random(seed), (48, 64), 3).action.split()[0] for seed in range(40)]
    assert {"prune", "remove", "add", "move", "input"} <= set(drawn)
    assert drawn == [draw(parent, random.Random(seed), (48, 64), 3).action.split()[0] for seed in range(40)]


def test_every_drawn_child_trains():
    parent = detector(small_spec())
    rng = random.Random(0)
    target = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([1])}]
    for _ in range(8):
        parent = draw(parent, rng, (48, 64), 4).apply(parent).train()
        sum(parent([torch.rand(3, 64, 96)], target).values()).backward()
        assert all(p.grad is not None for p in parent.parameters())


ACTIONS = {
    "add_block": lambda model: add_block(model, 0),
    "remove_block": lambda model: remove_block(model, 0),
    "rearrange": lambda model: rearrange(model, 0, 1),
    "prune_channels": lambda model: prune_channels(model, 0.5),
    "change_resolution": lambda model: change_resolution(model, 32),
    "draw": lambda model: draw(model, random.Random(0), [32], 3),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_on_a_detector_without_a_spec_says_what_it_takes(action):
    with pytest.raises(InputError, match=f"{action} takes a detector of jdkd.detect.build .* got a ResNet without one"):
        ACTIONS[action](resnet18())


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_sees_through_wrappers(action):
    model = detector(small_spec())
    model.backbone.body.layer1[0].conv1.weight.data.zero_()
    wrapped = nn.DataParallel(AveragedModel(model))
    morph = ACTIONS[action](wrapped)
    assert morph == ACTIONS[action](model)
    assert morph.apply(wrapped).spec == morph.spec


@pytest.mark.parametrize("stage", [-1, 4, 1.5, "layer1"])
def test_a_stage_that_is_none_is_named(stage):
    for act in (add_block, remove_block, lambda model, stage: rearrange(model, 0, stage)):
        with pytest.raises(InputError, match=f"stage {stage!r} is none of a detector's stages 0 to 3"):
            act(detector(small_spec()), stage)
