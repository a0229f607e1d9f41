"""How a search chooses: proposals, timings under a burst of other work, teachers."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from jdkd import notices
from jdkd.detect import read
from jdkd.distill import correlations
from jdkd.errors import ModelError
from jdkd.morph import change_resolution
from jdkd.notices import Notice
from jdkd.pool import ScoredTeacher, Space, Subnet
from jdkd.search import matching, pareto_front, screening
from jdkd.search.choice import choose, contender, fitness
from jdkd.search.screening import TARGET_MARGIN, Proposal
from tests.detectors import detector, small_spec
from tests.search.rows import ARCHITECTURE, candidate, timing


def proposal(similarity: float, ratio: float) -> Proposal:
    return Proposal("prune", None, (), similarity, ratio)


def test_below_the_aim_only_kept_features_count():
    aim = TARGET_MARGIN * 0.8
    assert proposal(0.9, aim).score(0.8) == 0.9 == proposal(0.9, 0.3).score(0.8)
    assert proposal(0.8, 0.7).score(0.8) > proposal(1.0, 1.0).score(0.8), "an unchanged student is not worth training"
    assert proposal(0.9, 0.9).score(0.8) < proposal(0.9, 0.85).score(0.8)


def test_the_parent_looks_once_for_all_proposals(monkeypatch):
    probe = [list(torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    parent, alike = detector(small_spec()), detector(small_spec())
    looks, found, expected, topology = [], [], [], read(parent)

    def compared(student, seen, batches, channels):
        expected.append(correlations(student, alike, probe, channels=channels, own_size=True))
        found.append(correlations(student, seen, batches, channels=channels))
        return found[-1]

    monkeypatch.setattr(screening, "correlations", compared)
    parent.backbone.register_forward_hook(lambda module, *state: looks.append(module))  # children have it too
    config = SimpleNamespace(proposals=3, resolutions=(0.5, 1.0), target_latency=0.8)
    context = SimpleNamespace(
        config=config, base=parent, topology=topology, probe=lambda: iter(probe), calibrated=nn.Module.eval,
        read=lambda model: topology if model is parent else read(model),
        timed=lambda models: {name: timing((5.0, 5.0), name=name) for name in models},
        progress=lambda *state: None, image_sizes=[],
    )  # fmt: skip
    chosen = screening.screen(parent, {}, context, random.Random(0))
    assert sum(module is parent.backbone for module in looks) == len(probe)
    assert found == expected and len(found) == 3
    assert chosen.similarity == max(1 - sum(r.values()) / len(r) for r in found) > 0


def test_an_architecture_that_the_search_knows_is_not_timed_again(monkeypatch):
    one, same, other = ARCHITECTURE, ARCHITECTURE.replace(), ARCHITECTURE.replace(classes=("dog",))
    drawn = [Proposal(f"{i}", SimpleNamespace(architecture=made), (), 0.9) for i, made in enumerate((one, same, other))]
    monkeypatch.setattr(screening, "_propose", lambda *given: drawn[len(done)])
    monkeypatch.setattr(screening, "pyramids", lambda *given: None)
    done, timed = [], []

    def measured(models):
        timed.append(list(models))
        return {name: timing((9.0, 9.0), name=name) for name in models}

    context = SimpleNamespace(
        config=SimpleNamespace(proposals=3, target_latency=0.8), probe=lambda: None, timed=measured,
        read=lambda _: None,
        progress=lambda *state: done.append(state),
    )  # fmt: skip
    assert screening.screen(None, {other.id: 0.7}, context, None).latency_ratio == 0.7
    assert timed == [[one.id]]
    done.clear()
    assert screening.screen(None, {one.id: 0.9, other.id: 0.7}, context, None).action == "2"
    assert len(timed) == 1


def test_a_proposal_too_small_for_some_image_is_left_out_and_said(monkeypatch):
    one = Proposal("prune", SimpleNamespace(architecture=ARCHITECTURE), (), 0.9)
    fates = []

    def propose(*given):
        if (fate := fates.pop(0)) is None:
            raise ModelError("long.png is 2x200, of which FasterRCNN leaves no pixel")
        return fate

    monkeypatch.setattr(screening, "_propose", propose)
    monkeypatch.setattr(screening, "pyramids", lambda *given: None)
    context = SimpleNamespace(
        config=SimpleNamespace(proposals=2, target_latency=0.8),
        probe=lambda: None,
        progress=lambda *state: None,
        read=lambda _: None,
    )
    for fates[:] in ([None, one], [one, None]):
        with pytest.warns(Notice, match=r"left out: long\.png is 2x200"):
            assert screening.screen(None, {ARCHITECTURE.id: 0.7}, context, None).action == "prune"
        notices._said.clear()
    fates[:] = [None, None]
    with pytest.warns(Notice), pytest.raises(ModelError):
        screening.screen(None, {}, context, None)


def test_no_student_is_proposed_that_leaves_no_pixel_of_an_image(context, monkeypatch):
    shrunk, topology = change_resolution(context.base, 32), context.topology
    monkeypatch.setattr(screening, "draw", lambda *given, **options: shrunk)
    seen = screening.pyramids(context.base, context.probe())
    student = screening._propose(context.base, topology, seen, context, random.Random(0)).student
    assert student.transform.min_size == (32,)
    long = ("long.png", 1, student.transform.max_size + 1)
    monkeypatch.setattr(type(context), "image_sizes", [long])
    with pytest.raises(ModelError, match=r"long\.png"):
        screening._propose(context.base, topology, seen, context, random.Random(0))


def test_a_proposal_whose_features_are_no_numbers_is_never_chosen():
    assert max((proposal(math.nan, 0.5), proposal(-1.0, 2.0)), key=lambda p: p.score(0.8)).similarity == -1.0


@pytest.fixture
def pool():
    """Three scored teachers and the memory of what else was scored."""
    space = Space.from_base(read(detector(small_spec())))
    smaller = Subnet(space.smallest.depths, (space.widths[0], *space.widths[-1:] * 3))
    members = [
        ScoredTeacher(s, map, 1) for s, map in ((space.largest, 0.6), (smaller, 0.55), (space.smallest, 0.4))
    ]

    def score(subnet, selection):
        return ScoredTeacher(subnet, 0.1, 1)

    return SimpleNamespace(space=space, members=members, teacher=lambda subnet: subnet, score=score)


def matched(pool, student_map, correlation, monkeypatch, present=None) -> tuple[Subnet, str]:
    def distances(student, teacher, probe, channels):
        return {4: 1 - correlation.get(teacher, 0.5), 8: 1 - correlation.get(teacher, 0.5)}

    monkeypatch.setattr(matching, "correlations", distances)
    context = SimpleNamespace(
        base=None, selection=SimpleNamespace(dataset=None), progress=lambda *state: None, probe=lambda: iter(())
    )
    present = present or pool.space.largest
    return matching.match(None, student_map, (0,), present, pool, context, random.Random(0))


def test_the_teacher_that_is_ahead_and_speaks_the_language_is_chosen(pool, monkeypatch):
    best, second, third = (member.teacher for member in pool.members)
    assert matched(pool, 0.3, {}, monkeypatch) == (best, f"stay with {best}")
    assert matched(pool, 0.3, {best: 0.1, second: 0.9}, monkeypatch) == (second, f"learn from {second}")
    assert matched(pool, 0.39, {best: 0.0, second: 0.0, third: 0.9}, monkeypatch)[0] == third


@pytest.mark.parametrize("student_map", [0.6, 0.7, 1.0])
@pytest.mark.parametrize("relation", [0.9, 0.05, 0.0, -0.9])
def test_once_no_teacher_is_ahead_the_present_one_stays(pool, student_map, relation, monkeypatch):
    best, second, third = (member.teacher for member in pool.members)
    for present in (best, second, third):
        chosen, action = matched(pool, student_map, {third: relation}, monkeypatch, present)
        assert chosen == present and action == f"stay with {present}, no related teacher is ahead"


@pytest.mark.parametrize("unrelated", [0.0, -0.8, math.nan])
def test_a_teacher_that_is_ahead_but_unrelated_is_not_chosen(pool, unrelated, monkeypatch):
    best, second, third = (member.teacher for member in pool.members)
    assert matched(pool, 0.3, {best: unrelated, second: 0.01, third: unrelated}, monkeypatch, third)[0] == second
    everywhere = dict.fromkeys((best, second, third), unrelated)
    assert matched(pool, 0.3, everywhere, monkeypatch, third)[0] == third


@pytest.mark.parametrize("score", [-1.0, math.nan])
def test_a_teacher_without_a_score_is_not_chosen(pool, score, monkeypatch):
    best, second, _ = (member.teacher for member in pool.members)
    pool.members[0] = ScoredTeacher(best, score, 1)
    assert matched(pool, 0.3, {best: 0.99}, monkeypatch)[0] == second


def test_of_teachers_that_promise_the_same_the_present_one_stays(pool, monkeypatch):
    subnets = [member.teacher for member in pool.members]
    pool.members = [ScoredTeacher(subnet, 0.6, 1) for subnet in subnets]
    for present in subnets:
        assert matched(pool, 0.3, {}, monkeypatch, present)[0] == present


def test_neighbours_that_were_scored_are_remembered(pool, monkeypatch):
    before = len(pool.members)
    matched(pool, 0.3, {}, monkeypatch)
    fresh = pool.members[before:]
    assert 1 <= len(fresh) <= matching.NEIGHBOURS
    assert len({member.teacher for member in pool.members}) == len(pool.members)


def test_the_front_holds_what_nothing_beats():
    a, b, c, d = (
        candidate(0, map=0.40, ratio=1.0),
        candidate(1, map=0.38, ratio=0.8),
        candidate(2, map=0.37, ratio=0.9),
        candidate(3, map=0.41, ratio=1.1),
    )
    assert pareto_front([a, b, c, d]) == [b, a, d]


def test_the_student_is_the_best_that_meets_the_target_or_the_fastest():
    slow, fast, faster = (candidate(i, map=m, ratio=r) for i, (m, r) in enumerate(((0.5, 0.9), (0.4, 0.7), (0.3, 0.6))))
    assert choose([slow, fast, faster], target=0.8) is fast
    assert choose([slow, fast, faster], target=0.5) is faster
    assert fitness(fast, 0.7) == fast.map and fitness(slow, 0.7) < slow.map


def test_of_one_architecture_the_better_is_the_student():
    worse, better = candidate(1, map=0.3, ratio=0.9), candidate(2, map=0.4, ratio=0.9)
    for target in (0.95, 0.5):
        assert choose([worse, better], target) is choose([better, worse], target) is better
        assert pareto_front([worse, better]) == [better]


def test_whoever_may_be_the_student_is_timed_at_length_before_one_is_chosen():
    slow = candidate(1, map=0.6, ratio=0.95, interval=(0.9, 1.0))
    near = candidate(2, map=0.5, ratio=0.83, interval=(0.78, 0.88))
    sure, worse = candidate(3, map=0.4, ratio=0.6), candidate(4, map=0.3, ratio=0.5)
    students, timed = [worse, sure, near, slow], set()
    assert contender(students, 0.8, timed) is near, "by its interval it may meet the target"
    assert contender(students, 0.8, timed | {near.architecture_id}) is sure, "it does not, and the next one may"
    assert contender(students, 0.8, timed | {near.architecture_id, sure.architecture_id}) is None
    met = candidate(2, map=0.5, ratio=0.79, interval=(0.785, 0.795))
    assert contender([worse, sure, met, slow], 0.8, {met.architecture_id}) is None
    assert choose([worse, sure, met, slow], 0.8) is met


def test_where_no_one_meets_the_target_the_fastest_is_timed_at_length():
    slow, fast = candidate(1, map=0.6, ratio=0.95), candidate(2, map=0.5, ratio=0.9)
    assert contender([slow, fast], 0.5, set()) is fast
    assert contender([slow, fast], 0.5, {fast.architecture_id}) is None
    slower = candidate(2, map=0.5, ratio=0.97)
    assert contender([slow, slower], 0.5, {slower.architecture_id}) is slow, "at length it was not the fastest"
