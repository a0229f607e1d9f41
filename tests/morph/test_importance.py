"""Importance by gradients: what a mask on the unit would do to the losses, and nothing else of the model changes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import trace
from jdkd.morph import add_block, gradients, rearrange
from jdkd.morph.importance import CRITERIA, LEARNT, channel_importance
from jdkd.morph.origins import names_before
from jdkd.rewrite.channels import named
from tests.detectors import detector, small_spec
from tests.morph.small import parent

IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GROUPS = {
    "inner": "backbone.body.layer2.1.conv1",
    "stream": "backbone.body.layer2.0.downsample.0",
    "head": "roi_heads.box_head.fc6",
}


@pytest.fixture(scope="module")
def model():
    return detector(small_spec())


@pytest.fixture(scope="module")
def topology(model):
    return read(model, size=(64, 96))


def batch(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 96, generator=generator) for _ in range(count)]
    box = torch.tensor([[4.0, 4.0, 40.0, 50.0]])
    return images, [{"boxes": box + 3 * k, "labels": torch.tensor([1 + k % 3])} for k in range(count)]


def still(model):
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def losses(model, images, targets, relative=False):
    torch.manual_seed(0)
    return sum(loss / loss.item() if relative else loss for loss in model(images, targets).values())


class DropPath(nn.Module):
    """As timm has it."""


@pytest.mark.parametrize(
    "kind", [DropPath, nn.Dropout2d, lambda: StochasticDepth(0.5, "row"), lambda: nn.SyncBatchNorm(3)]
)
def test_what_leaves_to_chance_what_is_computed_is_off_while_gradients_are_taken(kind):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), kind()).eval()
    with gradients._still(model):
        assert model[0].training and not model[1].training
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", GROUPS.values(), ids=GROUPS)
def test_fisher_is_the_squared_gradient_of_one_mask_at_all_places_that_read_a_unit(model, topology, name):
    images, targets = batch(3)
    found = channel_importance(model, topology, "fisher", [(images[:2], targets[:2]), (images[2:], targets[2:])])
    masked, group = still(model), topology[name]
    mask = torch.ones(group.units, requires_grad=True)
    for slot in group.slots:
        if slot.role == "in":
            layer = masked.get_submodule(slot.tensor.rpartition(".")[0])
            unit_of = torch.empty(slot.places.size, dtype=torch.long)
            unit_of[torch.from_numpy(slot.places).flatten()] = torch.arange(group.units).repeat_interleave(slot.repeat)

            def read_through(module, inputs, unit_of=unit_of):
                x = inputs[0]
                shape = [1, -1, 1, 1] if x.dim() == 4 else [1, -1]
                return (x * mask[unit_of].reshape(shape),)

            layer.register_forward_pre_hook(read_through)
    wanted = sum(
        torch.autograd.grad(losses(masked, [image], [target]), mask)[0].square()
        for image, target in zip(images, targets, strict=True)
    )
    torch.testing.assert_close(found[name] / found[name].sum(), wanted / wanted.sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("relative", [True, False])
def test_taylor_is_the_squared_sum_over_a_units_norms(model, topology, relative):
    given = [batch(2), batch(1, seed=1)]
    name = GROUPS["stream"]
    found = channel_importance(model, topology, "taylor", given, relative=relative)[name]
    wanted = torch.zeros(topology[name].units)
    for images, targets in given:
        trained = still(model)
        losses(trained, images, targets, relative).backward()
        norms = [trained.get_submodule(path) for path in topology.norms(topology[name])]
        assert len(norms) == 3  # the first block's, its shortcut's, the second block's
        wanted += sum(p.detach() * p.grad for norm in norms for p in norm.parameters()).square()
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", LEARNT)
def test_a_block_weighs_what_its_last_norm_adds_squared_channel_by_channel(model, topology, criterion):
    images, targets = batch(2)
    alone = [([image], [target]) for image, target in zip(images, targets, strict=True)]
    found = channel_importance(model, topology, criterion, [(images, targets)])
    first, second = "backbone.body.layer1.1", "backbone.body.layer3.1"
    wanted = dict.fromkeys([f"{first}.bn1", f"{first}.bn2", f"{second}.bn2"], 0.0)
    for given in alone if criterion == "fisher" else [(images, targets)]:
        trained = still(model)
        losses(trained, *given).backward()
        for name in wanted:
            parameters = trained.get_submodule(name).parameters()
            wanted[name] += sum(p.detach() * p.grad for p in parameters).square().sum().item()
    assert (found[first] / found[second]).item() == pytest.approx(
        wanted[f"{first}.bn2"] / wanted[f"{second}.bn2"], 1e-3
    )
    if criterion == "taylor":  # so are channels, by the norm that they pass
        inner = found[f"{first}.conv1"].sum()
        assert (found[first] / inner).item() == pytest.approx(wanted[f"{first}.bn2"] / wanted[f"{first}.bn1"], 1e-3)


@pytest.mark.parametrize("criterion", LEARNT)
def test_of_added_blocks_gradients_say_nothing_and_of_the_rest_what_they_said(model, topology, criterion):
    added = add_block(model, topology, "backbone.body.layer2")
    child = added.apply(model, topology)
    grown = read(child, size=(64, 96), like=topology)
    before, after = (channel_importance(m, t, criterion, [batch(2)]) for m, t in ((model, topology), (child, grown)))
    names = names_before(model, topology, added.rewrite, grown)
    assert set(names.values()) == before.keys(), "nothing that was there is forgotten"
    for name, was in names.items():
        torch.testing.assert_close(after[name], before[was], rtol=1e-5, atol=1e-9)
    new = after.keys() - names.keys()
    assert new and all("layer2.2" in name and not after[name].any() for name in new)


def test_moved_blocks_are_new_where_they_arrive_and_the_rest_keeps_track_of_its_name(model, topology):
    moved = rearrange(model, topology, "backbone.body.layer2", "backbone.body.layer1")
    grown = read(moved.apply(model, topology), size=(64, 96))
    names = names_before(model, topology, moved.rewrite, grown)
    lists = {blocks.name: blocks.blocks for blocks in grown.block_lists}
    *stayed, new = lists["backbone.body.layer1"]
    assert set(stayed) <= names.keys() and new not in names
    assert not any(name.startswith(f"{new}.") for name in names)
    known = {group.name for group in topology.groups} | {path for each in topology.block_lists for path in each.blocks}
    assert set(names.values()) < known


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_left_as_it_was_and_units_weigh_one_together(criterion):
    model = detector(small_spec())
    topology = read(model, size=(64, 96))
    block = model.backbone.body.layer2[1]
    for frozen in (model.backbone.body.conv1, block.bn1, block.conv2):  # what "taylor" and "fisher" read among them
        frozen.weight.requires_grad_(False)
    model.rpn.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model)
    chance = torch.random.get_rng_state()
    found = channel_importance(nn.DataParallel(model), topology, criterion, [batch(2)])
    assert torch.equal(chance, torch.random.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    blocks = [path for each in topology.block_lists for path in each.blocks] if criterion in LEARNT else []
    units = {group.name: group.units for group in topology.groups}
    assert {name: len(values) for name, values in found.items()} == units | dict.fromkeys(blocks, 1)
    assert sum(found[name].sum() for name in units).item() == pytest.approx(1, abs=1e-4)
    if criterion not in LEARNT:  # whatever the scale of its weights
        shares = {name: count / sum(units.values()) for name, count in units.items()}
        assert {name: found[name].sum().item() for name in units} == pytest.approx(shares, rel=1e-4)
    again = channel_importance(model, topology, criterion, [batch(2)])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize(
    ("name", "norm", "group"),
    [
        ("fcos", "backbone.body.2.0.bn2", "backbone.body.2.0.conv2"),
        ("fcos", "head.regression_head.conv.4", "head.regression_head.conv.3"),
        ("faster_rcnn", "backbone.body.layer2.1.bn1", "backbone.body.layer2.1.conv1"),
        ("pan", "stages.2.1.1", "stages.2.1.0"),
    ],
    ids=["frozen batch norm", "group norm", "batch norm", "a plain layer"],
)
def test_gamma_is_read_off_the_norms_that_a_group_passes(name, norm, group):
    model, topology = parent(name)
    model, half = copy.deepcopy(model), topology[group].size // 2
    for layer in topology.norms(topology[group]):
        model.get_submodule(layer).weight.data.fill_(1.0)
    model.get_submodule(norm).weight.data[:half] = 1e-3
    found = channel_importance(model, topology, "gamma")[group]
    weak = found.argsort()[: int((found < found.max() / 10).sum())]
    assert sorted(weak.tolist()) == [*range(half * topology[group].units // topology[group].size)]


def grouped():
    """Two units of four channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("several", ["norms", "channels"])
def test_gamma_is_the_mean_over_the_norms_and_the_channels_of_a_unit(several):
    model, topology = parent("faster_rcnn") if several == "norms" else (made := grouped(), trace(made, IMAGE))
    model, group = copy.deepcopy(model), topology[GROUPS["stream"] if several == "norms" else "0"]
    weights = {f"{norm}.weight": model.get_submodule(norm).weight.data.fill_(1.0) for norm in topology.norms(group)}
    slots = [slot for slot in group.slots if slot.tensor in weights]
    assert len(slots) > 1 if several == "norms" else slots[0].repeat == 4
    weights[slots[-1].tensor][slots[-1].places[1, -1]] = -7.0  # one channel of one norm
    found = channel_importance(model, topology, "gamma")[group.name]
    assert (found[1] / found[0]).item() == pytest.approx(1 + 6 / len(slots) / slots[0].repeat, rel=1e-5)


class Summed(nn.Module):
    """One group that two layers make, and that a linear layer reads at four places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(32, 2)

    def forward(self, x):
        return self.read(nn.functional.adaptive_avg_pool2d(self.a(x) + self.b(x), 2).flatten(1))


def test_magnitude_counts_all_places_of_a_unit_and_no_tensor_for_its_scale():
    torch.manual_seed(0)
    model = Summed()
    topology = trace(model, IMAGE)
    before = channel_importance(model, topology, "magnitude")["a"]
    model.b.weight.data.mul_(1e3)
    torch.testing.assert_close(channel_importance(model, topology, "magnitude")["a"], before)
    weight = model.read.weight.data.fill_(1.0).view(2, 8, 4)
    weight[:, 2, :3], weight[:, 5] = 0.0, 0.0
    found = channel_importance(model, topology, "magnitude")["a"]
    assert found[5] == 0 < found[2], "one of four places is less, and not nothing"


def test_magnitude_is_what_makes_a_unit_times_what_reads_it():
    model, topology = parent("ssd")
    model = copy.deepcopy(model)
    model.backbone.features[0].weight.data[3:11] *= 1e-3  # as made
    model.backbone.features[4].weight.data[:, 5:13] *= 1e-3  # as read
    found = channel_importance(model, topology, "magnitude")
    assert set(found["backbone.features.0"].argsort()[:8].tolist()) == set(range(3, 11))
    assert set(found["backbone.features.2"].argsort()[:8].tolist()) == set(range(5, 13))


@pytest.mark.parametrize("criterion", ["magnitude", "fisher"])
def test_a_unit_that_nothing_reads_weighs_nothing(criterion):
    model = detector(small_spec())
    topology = read(model, size=(64, 96))
    group = topology[GROUPS["stream"]]
    for slot in group.slots:
        if slot.role == "in":
            named(model, slot.tensor).data.index_fill_(slot.dim, torch.from_numpy(slot.places[3]), 0)
    found = channel_importance(model, topology, criterion, [batch(1)])[group.name]
    assert found[3] < found.sum() * 1e-6 and (found > 0).sum() == group.units - 1


@pytest.mark.parametrize("criterion", LEARNT)
def test_gradients_weigh_by_the_mean_over_batches_and_are_taken_without_the_callers(model, topology, criterion):
    once = gradients.gradient_importance(model, topology, [batch(1)], criterion)
    with torch.no_grad():
        twice = gradients.gradient_importance(model, topology, [batch(1)] * 2, criterion)
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("criterion", LEARNT)
def test_a_loss_that_is_nearly_gone_weighs_as_it_did_and_one_that_is_gone_weighs_nothing(model, topology, criterion):
    def weighed(factor, relative):
        learnt = copy.deepcopy(model)
        learnt.rpn.register_forward_hook(lambda _, __, found: (found[0], {k: factor * v for k, v in found[1].items()}))
        return channel_importance(learnt, topology, criterion, [batch(2)], relative=relative)

    names = [group.name for group in topology.groups]
    for relative in (True, False):
        before, after = (torch.cat([weighed(factor, relative)[name] for name in names]) for factor in (1, 1e-6))
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-9) is relative
    own = next(group.name for group in topology.groups if group.name.startswith("rpn."))
    gone = weighed(0.0, True)
    assert gone[own].sum() == 0 and all(values.isfinite().all() for values in gone.values())


class Told(nn.Module):
    """Losses that are known: one of each image, a constant, and one of what is not there."""

    def forward(self, images, targets):
        assert self.training
        torch.rand(1)
        return {"a": torch.tensor(-2.0), "b": torch.tensor(0.1 * len(images)), "never": torch.tensor(0.0)}


def test_the_smallest_loss_is_over_the_largest_and_one_that_is_never_there_does_not_count():
    model, before = Told().eval(), torch.get_rng_state()
    assert gradients.smallest_loss(model, [batch(1), batch(3)]) == pytest.approx(0.2 / 2)
    assert not model.training and torch.equal(before, torch.get_rng_state())
    assert gradients.smallest_loss(model, []) == 1


@pytest.mark.parametrize("unknown", [((),), ((), "known")], ids=["nothing is known", "one of two sums"])
def test_a_block_that_is_not_known_to_be_the_identity_has_no_weight(model, topology, unknown):
    first, *others = topology.block_lists
    unknown = tuple(first.ends[0][0] if chain == "known" else chain for chain in unknown)
    lists = (replace(first, ends=(unknown, *first.ends[1:])), *others)
    found = channel_importance(model, replace(topology, block_lists=lists), "taylor", [batch(1)])
    assert first.blocks[0] not in found and others[0].blocks[0] in found, "at 0 it would be the first to leave"


def test_what_cannot_weigh_is_refused(model, topology):
    with pytest.raises(InputError, match="one of gamma, magnitude, taylor, fisher, got 'l1'"):
        channel_importance(model, topology, "l1")
    with pytest.raises(InputError, match="'fisher' needs batches"):
        channel_importance(model, topology, "fisher")
    for junk in (3, [batch(1)[0]], (batch(1)[0], None)):
        with pytest.raises(InputError, match=r"needs batches \(images, targets\), a list of each, got"):
            channel_importance(model, topology, "fisher", [junk])
    with pytest.raises(InputError, match="taylor importance was given 0 batches"):
        channel_importance(model, topology, "taylor", [])
    with pytest.raises(InputError, match="read off another model"):
        channel_importance(parent("fcos")[0], topology, "gamma")
    broken = copy.deepcopy(model)
    broken.rpn.head.cls_logits.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="finite losses"):
        channel_importance(broken, topology, "taylor", [batch(1)])
