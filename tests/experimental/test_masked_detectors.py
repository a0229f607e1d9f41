"""A masked detector equals the one that was physically pruned, and candidates of one share what they can."""

import pytest
import torch

from jdkd.detect import read
from jdkd.experimental import PrunedCandidate, masked, score_candidates
from jdkd.graph import Topology
from jdkd.rewrite import Rewrite, elastic_groups, prune
from tests.detectors import assert_same, detector, outputs, small_spec

DROPPED = 3  # channels of every group


def kept(topology: Topology) -> dict[str, list[int]]:
    """What stays of every group: a list of its own, in order."""
    generator = torch.Generator().manual_seed(1)
    orders = {group.name: torch.randperm(group.units, generator=generator).tolist() for group in topology.groups}
    return {name: sorted(order[: max(1, len(order) - DROPPED)]) for name, order in orders.items()}


@pytest.mark.parametrize(("block", "norm"), [("basic", "batch"), ("bottleneck", "frozen")])
def test_with_a_mask_on_every_group_a_detector_equals_the_pruned_one(block, norm):
    parent = detector(small_spec(block, norm=norm))
    topology = read(parent)
    groups, keep = elastic_groups(parent, topology, topology.groups), kept(topology)
    assert set(groups.groups) == set(keep) and len(keep) > 10
    child, whole = prune(parent, topology, keep), outputs(parent)
    with masked(parent, keep, groups):
        assert_same(outputs(parent), outputs(child))
        slim = {name: tensor.shape for name, tensor in parent.state_dict().items()}
        assert slim == {name: tensor.shape for name, tensor in child.state_dict().items()}
    assert_same(outputs(parent), whole)


def test_a_channel_that_is_not_pruned_everywhere_shows():
    parent = detector(small_spec())
    topology = read(parent)
    groups, keep = elastic_groups(parent, topology, topology.groups), kept(topology)
    expected = outputs(prune(parent, topology, keep))
    for group in topology.groups:
        other = next(unit for unit in range(group.units) if unit not in keep[group.name])
        with masked(parent, keep | {group.name: [*keep[group.name][1:], other]}, groups):
            assert not all(map(torch.allclose, outputs(parent), expected)), group.name


def test_a_detector_equals_its_shallower_network():
    parent = detector(small_spec())
    topology = read(parent)
    blocks = topology.block_lists[2]
    child = Rewrite(blocks={blocks.name: range(len(blocks.blocks) - 1)}).apply(parent, topology)
    with masked(parent, {}, elastic_groups(parent, topology, topology.groups), skip=[blocks.blocks[-1]]):
        assert_same(outputs(parent), outputs(child))


def test_candidates_of_a_detector_equal_masking_one_by_one():
    model = detector(small_spec(proposals=8))
    topology = read(model)
    groups, images = elastic_groups(model, topology, topology.groups), [torch.rand(3, 64, 64)]
    candidates = [PrunedCandidate({name: units}) for name, units in list(kept(topology).items())[:6]]
    candidates += [PrunedCandidate(skip=[topology.block_lists[2].blocks[-1]]), PrunedCandidate()]
    calls, whole = [], outputs(model)
    for name in ("transform", "backbone.body.conv1"):
        module = model.get_submodule(name)
        run = module.forward
        module.forward = lambda *args, name=name, run=run: calls.append(name) or run(*args)
    found = score_candidates(model, candidates, images, groups)
    assert (calls.count("transform"), calls.count("backbone.body.conv1")) == (1, 2), "one candidate cuts the stem"
    for candidate, ours in zip(candidates, found, strict=True):
        with masked(model, candidate.keep, groups, skip=candidate.skip), torch.no_grad():
            torch.testing.assert_close(ours, model(images), rtol=0, atol=0)
    assert_same(outputs(model), whole)
