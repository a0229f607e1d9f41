"""Criteria of cuts: network slimming as the baseline cuts, and the table of the rows."""

import torch

from benchmarks import criteria
from jdkd.detect import read
from jdkd.morph.cutting import FLOOR
from tests.detectors import detector, small_spec
from tests.morph.small import SIZE
from tests.morph.test_cutting import priced


def test_slimming_takes_the_least_share_of_the_smallest_gammas_that_reaches_the_aim():
    model = detector(small_spec(fpn=64, box_head=64))
    topology = read(model, size=SIZE)
    first, *others = (g for g in topology.inner if topology.norms(g) and g.shrunk(FLOOR) < g.units)
    for group, most in ((first, 0.1), *((other, 1.0) for other in others)):
        for name in topology.norms(group):
            model.get_submodule(name).weight.data = torch.linspace(0.5 * most, most, group.size)
    table = priced(model, topology)
    morph = criteria._slimming(model, topology, table, 0.7)
    share = int(morph.action.split("by ")[1].rstrip("%")) / 100
    assert 0.6 < table.predict(model, topology, morph.rewrite) <= 0.7
    assert table.predict(model, topology, criteria._slimmed(model, topology, share - 0.05).rewrite) > 0.7
    left = {group.name: len(morph.rewrite.keep.get(group.name, range(group.units))) for group in (first, *others)}
    assert left[first.name] == first.shrunk(FLOOR)
    assert others and all(left[other.name] == other.units for other in others)


def row(**other):
    made = {"base": "mine/base-0", "base_map": 0.7, "aim": 0.53, "steps": 9, "criterion": "taylor"}
    made |= {"relative": True, "repaired": True}
    return made | {"ratio": 0.54, "kept_r": 0.8, "map": 0.1, "map_trained": 0.3} | other


def test_the_table_has_the_latest_row_of_each_criterion_and_repair_and_one_for_each_aim():
    rows = [row(), row(repaired=False, map_trained=None, relative=None), row(map=0.2), row(aim=0.75)]
    first, second = criteria.table(rows).split("\n\n")
    head, _, repaired, bare = first.splitlines()
    assert "after 9 steps" in head
    assert repaired == "| mine/base-0 | 0.700 | taylor | each over itself | yes | 0.540 | 0.800 | 0.200 | 0.300 |"
    assert bare.endswith("| 0.100 |  |") and "| taylor |  | no |" in bare
    assert len(second.splitlines()) == 3
    assert criteria.table([]) == ""
