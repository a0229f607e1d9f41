"""What a cut leaves to be read is known without another trace."""

import numpy as np
import pytest

from jdkd.detect import read
from jdkd.rewrite import Rewrite
from tests.morph.small import SIZE, parent


def facts(topology):
    """A topology, whatever the order in which it was read."""
    groups = {
        group.name: (group.units, sorted((s.tensor, s.dim, s.role, tuple(s.places.ravel())) for s in group.slots))
        for group in topology.groups
    }
    return groups, topology.block_lists, topology.sizes, topology.followed, set(topology.unreached)


@pytest.mark.parametrize("family", ["faster_rcnn", "fcos", "pan", "ssd"])
def test_a_cut_child_is_read_as_foreseen(family):
    model, _ = parent(family)
    topology = read(model, size=SIZE)
    rng = np.random.default_rng(0)
    keep = {
        group.name: rng.permutation(group.units)[: max(2, group.units * 2 // 3)].tolist()
        for group in topology.groups[::2]
    }
    rewrite = Rewrite(keep=keep)
    child = rewrite.apply(model, topology)
    assert facts(rewrite.foreseen(topology, child)) == facts(read(child, size=SIZE))
    again = Rewrite(keep={name: range(1, len(units)) for name, units in keep.items() if len(units) > 3})
    foreseen = rewrite.foreseen(topology, child)
    grandchild = again.apply(child, foreseen)
    assert facts(again.foreseen(foreseen, grandchild)) == facts(read(grandchild, size=SIZE))


def test_blocks_and_growth_have_to_be_read():
    model, _ = parent("faster_rcnn")
    topology = read(model, size=SIZE)
    blocks = topology.block_lists[0]
    assert Rewrite(blocks={blocks.name: range(len(blocks.blocks))}).foreseen(topology, model) is None
    assert Rewrite(extra={topology.groups[0].name: 1}).foreseen(topology, model) is None
