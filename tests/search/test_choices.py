"""How a search chooses: proposals, timings under a burst of other work, teachers."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from jdkd.distill import correlations
from jdkd.latency import Latency, LatencyReport, ModelLatency
from jdkd.pool import Member, Space, Subnet
from jdkd.search import matching, screening
from jdkd.search.screening import HEADROOM, Proposal
from jdkd.search.setting import Setting
from tests.detectors import detector, small_spec


def proposal(similarity: float, ratio: float) -> Proposal:
    return Proposal("prune", None, (), similarity, ratio)


def test_below_the_aim_only_kept_features_count():
    aim = HEADROOM * 0.8
    assert proposal(0.9, aim).worth(0.8) == 0.9 == proposal(0.9, 0.3).worth(0.8)
    assert proposal(0.8, 0.7).worth(0.8) > proposal(1.0, 1.0).worth(0.8), "an unchanged student is not worth training"
    assert proposal(0.9, 0.9).worth(0.8) < proposal(0.9, 0.85).worth(0.8)


def test_a_burst_of_other_work_does_not_decide_a_timing():
    quiet = {"base": [10.0] * 10, "student": [8.0] * 10}
    disturbed = {"base": [10.0] * 10, "student": [8.0] * 4 + [50.0] * 6}
    for samples in (quiet, disturbed):
        models = {name: ModelLatency(end_to_end=Latency(tuple(times))) for name, times in samples.items()}
        assert Setting.quiet_ratio(LatencyReport(models, {}, {}), "student") == pytest.approx(0.8)


def test_the_parent_looks_once_for_all_proposals(monkeypatch):
    probe = [list(torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    parent, alike = detector(small_spec()), detector(small_spec())
    looks, found, expected = [], [], []

    def compared(student, seen, batches, channels):
        expected.append(correlations(student, alike, probe, channels=channels, own_size=True))
        found.append(correlations(student, seen, batches, channels=channels))
        return found[-1]

    monkeypatch.setattr(screening, "correlations", compared)
    parent.backbone.register_forward_hook(lambda *state: looks.append(state))
    config = SimpleNamespace(proposals=3, resolutions=(0.5, 1.0), target_latency=0.8)
    setting = SimpleNamespace(
        config=config, base=parent, probe=lambda: iter(probe), calibrated=nn.Module.eval, timed=lambda models: None,
        quiet_ratio=lambda report, name: 0.5, progress=lambda *state: None,
    )  # fmt: skip
    chosen = screening.screen(parent, setting, random.Random(0))
    assert len(looks) == len(probe)
    assert found == expected and len(found) == 3
    assert chosen.similarity == max(1 - sum(r.values()) / len(r) for r in found) > 0


@pytest.fixture
def pool():
    """Three scored teachers and the memory of what else was scored."""
    space = Space.around(small_spec())
    smaller = Subnet(space.smallest.depths, (space.widths[0], *space.widths[-1:] * 3))
    members = [Member(s, map, 1, 0.2) for s, map in ((space.everything, 0.6), (smaller, 0.55), (space.smallest, 0.4))]

    def score(subnet, base, selection):
        return Member(subnet, 0.1, 1, 0.2)

    return SimpleNamespace(space=space, members=members, teacher=lambda subnet: subnet, score=score)


def matched(pool, student_map: float, correlation: dict[Subnet, float], monkeypatch) -> Subnet:
    def distances(student, teacher, probe, channels):
        return {4: 1 - correlation.get(teacher, 0.5), 8: 1 - correlation.get(teacher, 0.5)}

    monkeypatch.setattr(matching, "correlations", distances)
    setting = SimpleNamespace(base=None, selection=None, progress=lambda *state: None, probe=lambda: iter(()))
    return matching.match(None, student_map, (0,), pool.space.everything, pool, setting, random.Random(0))


def test_the_teacher_that_is_ahead_and_speaks_the_language_is_chosen(pool, monkeypatch):
    best, second, third = (member.subnet for member in pool.members)
    assert matched(pool, 0.3, {}, monkeypatch) == best
    assert matched(pool, 0.3, {best: 0.1, second: 0.9}, monkeypatch) == second
    assert matched(pool, 0.39, {best: 0.0, second: 0.0, third: 0.9}, monkeypatch) == third


def test_neighbours_that_were_scored_are_remembered(pool, monkeypatch):
    before = len(pool.members)
    matched(pool, 0.3, {}, monkeypatch)
    fresh = pool.members[before:]
    assert 1 <= len(fresh) <= matching.NEIGHBOURS
    assert len({member.subnet for member in pool.members}) == len(pool.members)
