"""A rewrite travels as JSON and does the same where it arrives."""

import json

import pytest
import torch

from jdkd.detect.architecture import architecture_of
from jdkd.morph import Morph, add_block, change_resolution, rearrange, remove_block
from jdkd.rewrite import Rewrite
from tests.morph.small import parent


@pytest.mark.parametrize("rewrite", [
    Rewrite(),
    Rewrite(keep={"a": (0, 2, 5)}, blocks={"b": (0, 0, 1)}),
    Rewrite(extra={"a": 3}, attributes={"transform.min_size": (64,), "transform.max_size": 96, "flag": True, "x": 0.5}),
])  # fmt: skip
def test_what_comes_back_is_equal(rewrite):
    assert Rewrite.from_json(json.loads(json.dumps(rewrite.to_json()))) == rewrite


def test_ranges_and_tensors_of_places_become_plain_numbers():
    sent = json.loads(json.dumps(Rewrite(keep={"a": range(3)}, blocks={"b": torch.tensor([1, 0])}).to_json()))
    assert sent["keep"] == {"a": [0, 1, 2]} and sent["blocks"] == {"b": [1, 0]}
    assert Rewrite.from_json(sent) == Rewrite(keep={"a": (0, 1, 2)}, blocks={"b": (1, 0)})


def test_every_action_does_the_same_after_the_journey():
    model, topology = parent("faster_rcnn")
    lists = [blocks.name for blocks in topology.block_lists]
    morphs = [
        Morph("halve", Rewrite(keep={group.name: range(group.shrunk(0.5)) for group in topology.groups})),
        add_block(model, topology, lists[0]),
        remove_block(model, topology, lists[-1]),
        rearrange(model, topology, lists[1], lists[0]),
        change_resolution(model, 48),
    ]
    for morph in morphs:
        sent = Rewrite.from_json(json.loads(json.dumps(morph.rewrite.to_json())))
        children = []
        for rewrite in (morph.rewrite, sent):
            torch.manual_seed(0)
            children.append(rewrite.apply(model, topology))
        one, two = children
        assert architecture_of(one, "a test").id == architecture_of(two, "a test").id, morph.action
        assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
