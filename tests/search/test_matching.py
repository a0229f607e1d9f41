"""Who teaches a student: one that is ahead of it and whose features it can explain, or nobody."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from jdkd.detect import read
from jdkd.distill.alignment import PyramidSnapshot
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.pool import ScoredTeacher, Space, Subnet
from jdkd.pool.members import BASE
from jdkd.search import Method, matching
from jdkd.search.matching import Matching
from jdkd.search.spending import Spending
from tests.detectors import detector, small_spec
from tests.search.rows import candidate


@pytest.fixture
def pool():
    """Two scored subnets, a foreign teacher, and the memory of what else was scored."""
    space = Space.from_base(read(detector(small_spec())))
    members = [ScoredTeacher(t, map, 1) for t, map in ((space.largest, 0.6), ("yolo", 0.55), (space.smallest, 0.4))]
    return SimpleNamespace(
        space=space,
        members=members,
        teacher=lambda teacher: teacher,
        scored=lambda t, detector, data: ScoredTeacher(t, 0.1, 1),
        foreign={members[1].teacher: None},
    )


@pytest.fixture
def matched(pool, monkeypatch):
    """The teacher of a student of an mAP, by the shares of each teacher's features that it explains."""

    spent = Spending()

    def of(map, shares=None, *, base_map=0.3, present=None, teaching="dynamic", ours=pool, anyone=False):
        def explained(student, teacher):
            share = (shares or {}).get(teacher, 0.5)
            if isinstance(share, Exception):
                raise share
            return share

        monkeypatch.setattr(matching, "pyramids", lambda model, batches: model)
        monkeypatch.setattr(matching, "_bytes", lambda seen: 100)
        monkeypatch.setattr(matching, "explained", explained)
        config = SimpleNamespace(method=Method(teaching=teaching))
        context = SimpleNamespace(
            base=BASE, config=config, selection=SimpleNamespace(dataset=None), progress=lambda *state: None,
            probe=lambda: iter(()), spent=spent,
        )  # fmt: skip
        parent = candidate(1, map=map, teacher=present)
        of.matching = Matching(context, ours, base_map)
        return of.matching.of("student", parent, random.Random(0), anyone=anyone)

    of.spent = spent
    return of


def test_the_teacher_that_is_ahead_and_speaks_the_language_is_chosen(pool, matched):
    largest, foreign, smallest = (member.teacher for member in pool.members)
    assert matched(0.2) == largest
    assert matched(0.2, {largest: 0.1, foreign: 0.9}) == foreign
    assert matched(0.2, {largest: 0.1, foreign: 0.1, smallest: 0.9}) == smallest
    assert matched(0.2, {largest: 0.01, foreign: 0.01, smallest: 0.01}) == BASE
    assert matched(0.5, {largest: 0.4, foreign: 0.6}) == largest, "ahead by 0.1 and not by 0.05"


@pytest.mark.parametrize("share", [0.9, 0.05, 1.0])
def test_a_teacher_that_is_behind_never_teaches_however_alike_it_is(pool, matched, share):
    largest, foreign, smallest = (member.teacher for member in pool.members)
    assert matched(0.45, {smallest: 1.0, BASE: 1.0, largest: share, foreign: 0.01}) == largest
    for ahead_of_all in (0.6, 0.7, 1.0):
        for present in (None, BASE, foreign, smallest):
            assert matched(ahead_of_all, {smallest: share, BASE: share}, present=present) is None


def test_where_it_is_tried_against_nobody_the_best_teaches_though_none_is_ahead(pool, matched):
    largest, foreign, _ = (member.teacher for member in pool.members)
    assert matched(0.7, {largest: 0.1, foreign: 0.9}, anyone=True) == largest
    assert matched(0.7, base_map=0.65, anyone=True) == BASE
    assert matched(0.6, anyone=True) == largest, "who is as good is not ahead"
    assert matched(0.45, {foreign: 0.9, largest: 0.1}, anyone=True) == foreign, "who is ahead comes first"
    assert matched(0.7, {largest: 0.0}, anyone=True) is None
    pool.members[0] = ScoredTeacher(largest, math.nan, 1)
    assert matched(0.7, anyone=True) == foreign


def test_what_is_ahead_by_little_is_ahead(matched):
    assert matched(0.6) is None and matched(0.599) is not None


@pytest.mark.parametrize("unrelated", [0.0, -0.8, math.nan])
def test_a_teacher_that_is_ahead_but_unrelated_does_not_teach(pool, matched, unrelated):
    largest, foreign, smallest = (member.teacher for member in pool.members)
    assert matched(0.2, {largest: unrelated, foreign: 0.01, smallest: unrelated, BASE: unrelated}) == foreign
    assert matched(0.2, dict.fromkeys((largest, foreign, smallest, BASE), unrelated)) is None


@pytest.mark.parametrize("score", [-1.0, math.nan])
def test_a_teacher_without_a_score_does_not_teach(pool, matched, score):
    largest, foreign, _ = (member.teacher for member in pool.members)
    pool.members[0] = ScoredTeacher(largest, score, 1)
    assert matched(0.2, {largest: 1.0}) == foreign
    assert matched(0.2, teaching="fixed") == foreign


def test_a_given_teacher_teaches_alone_where_that_is_the_method(pool, matched):
    assert matched(0.9, teaching="given") == pool.members[1].teacher
    assert matched(0.1, {pool.members[0].teacher: 1.0}, teaching="given") == pool.members[1].teacher


def test_of_equally_related_ones_the_one_that_is_further_ahead_teaches(pool, matched):
    assert matched(0.35) == pool.members[0].teacher
    pool.members.reverse()
    assert matched(0.35) == pool.members[-1].teacher
    assert matched(0.35, base_map=0.9) == BASE


def test_a_teacher_that_cannot_be_compared_is_left_out_and_said_once(pool, matched):
    largest, foreign, _ = (member.teacher for member in pool.members)
    with pytest.warns(Notice, match=r"does not teach this student: no common stride") as said:
        assert matched(0.2, {largest: InputError("no common stride.")}) == foreign
    assert len(said) == 1


def test_what_teaches_can_be_set(pool, matched):
    assert matched(0.9, teaching="fixed") == pool.members[0].teacher, "the pool's best, whatever the student"
    assert matched(0.9, teaching="given") == pool.members[1].teacher, "of those that were given"
    assert matched(0.9, teaching="base") == BASE
    assert matched(0.2, teaching="none") is None
    assert matched(0.2, ours=None) == BASE, "without a pool the base teaches"


def test_neighbours_of_the_present_teacher_are_scored_and_remembered(pool, matched):
    before = len(pool.members)
    assert not matched.spent.seconds
    matched(0.2, present=pool.space.smallest)
    assert matched.spent.seconds.keys() == {"scoring"}, "and are no part of what proposing costs"
    fresh = pool.members[before:]
    assert 1 <= len(fresh) <= matching.NEIGHBOURS and all(isinstance(member.teacher, Subnet) for member in fresh)
    assert len({member.teacher for member in pool.members}) == len(pool.members)
    for present in (None, BASE, "yolo", pool.space.smallest):  # the last draws the same again, which are known
        matched(0.2, present=present)
    assert len(pool.members) == before + len(fresh), "what is no subnet has none that are new"


@pytest.mark.parametrize(("room", "kept"), [(10**9, 4), (250, 2), (0, 0)])
def test_what_teachers_make_of_the_probe_is_kept_while_there_is_room(pool, matched, monkeypatch, room, kept):
    asked = []
    pool.teacher = lambda teacher: asked.append(teacher) or teacher
    monkeypatch.setattr(matching, "ROOM", room)
    first = matched(0.2)
    assert len(asked) == 3 and len(matched.matching._seen) == kept
    assert matched.matching.of("another", candidate(1, map=0.2, teacher=None), random.Random(0)) == first
    assert len(asked) == 3 + 3 - max(0, kept - 1), "the base is there anyway"


def test_features_are_counted_in_bytes():
    seen = [PyramidSnapshot({"0": torch.zeros(2, 3, 4, 5), "1": torch.zeros(2, 3, 2, 2).half()}, (32, 40), ())]
    assert matching._bytes([*seen, *seen]) == 2 * (480 + 48)
