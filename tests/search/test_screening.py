"""Which students are proposed, without any training, and what a proposal is."""

import json
import math
import random
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jdkd.detect.architecture import architecture_of
from jdkd.detect.regions import region_count
from jdkd.distill import correlations
from jdkd.errors import InputError
from jdkd.morph import add_block, grow
from jdkd.notices import Notice
from jdkd.search import Archive, Method, Proposal, screening, strategy
from jdkd.search.archive import ARCHIVE
from jdkd.search.budget import MARGIN
from jdkd.search.inheriting import fresh, inherit
from jdkd.search.screening import CHANNELS, STRUCTURE, Parent, Recipe, screen, trimmed
from jdkd.search.strategy import Strategy
from jdkd.search.timing import BRIEF, LONG
from tests.search.rows import candidate, timing

EVERYTHING = STRUCTURE, CHANNELS


@pytest.fixture
def timed(context, monkeypatch):
    """Sets what a student is timed at, over what its table predicts; how long they were timed is kept."""
    stages = []

    def at(factor, table):
        def measured(models, stage, *, kept):
            stages.append(stage)
            assert kept == table.kept
            ((name, model),) = models.items()
            return {name: timing((10 * factor * table.predict(model),) * 2, name=name)}

        monkeypatch.setattr(context, "timed", measured)

    at.stages = stages
    return at


def test_students_are_predicted_to_meet_the_aim_and_are_of_different_architectures(parent, steady):
    found = screen([parent], 0.8, 3, EVERYTHING, random.Random(0))
    assert 1 <= len(found) <= min(3, parent.context.config.proposals)
    assert len({one.architecture_id for _, one in found}) == len(found)
    for origin, one in found:
        assert origin is parent.candidate and one.rewrites and "%" in one.action
        assert one.predicted <= 0.8 + 1e-9 and 0 < one.similarity < 1 and 0.5 < one.latency_ratio < 1
        assert one.student.architecture.id == one.architecture_id != parent.context.base_id


def test_the_similarity_is_the_mean_r_of_every_level_with_the_parents(parent, steady):
    made = parent.make(Recipe(), 0.8)
    context = parent.context
    kept = inherit(parent.model, parent.topology, made.rewrites, context).kept
    levels = correlations(made.student, context.base, context.probe(), channels=kept, own_size=True).values()
    assert made.similarity == pytest.approx(1 - sum(levels) / len(levels), abs=1e-5)


def test_a_recipe_makes_one_student_and_its_rewrites_make_it_again_from_json(parent, steady):
    rng = random.Random(1)
    grown = grow(parent.model, parent.topology, rng, max_depth=parent.context.most_blocks)
    drawn = parent.draw(EVERYTHING, rng)
    for recipe in (Recipe(min_size=32), drawn, Recipe(grown=grown), Recipe(grown=grown, channels=False)):
        one, two = parent.make(recipe, 0.7), parent.make(recipe, 0.7)
        assert (one.rewrites, one.action, one.similarity) == (two.rewrites, two.action, two.similarity)
        sent = json.loads(json.dumps([rewrite.to_json() for rewrite in one.rewrites]))
        read = [type(one.rewrites[0]).from_json(fields) for fields in sent]
        again = inherit(parent.model, parent.topology, read, parent.context).model
        assert architecture_of(again, "a test").id == one.architecture_id
        ours = one.student.state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(("maps", "share"), [((0.4, 0.399), 4), ((0.4, 0.39), 2), ((0.39, 0.4), None)])
def test_children_of_the_base_propose_as_few_regions_as_it_finds_as_much_in(parent, context, monkeypatch, maps, share):
    scores, told = iter(maps), []
    monkeypatch.setattr(type(context), "scored", lambda self, detector, part: SimpleNamespace(map=next(scores)))
    monkeypatch.setattr(context, "progress", lambda *state: told.append(state))
    parent = Parent(parent.candidate, parent.table, context)
    now = region_count(parent.model)
    wanted = share and now // share
    assert parent.plain(EVERYTHING).regions == parent.draw(EVERYTHING, random.Random(0)).regions == wanted
    assert told[-1][:3] == ("scoring the base with fewer regions", 2, 2), "its bar ends, though not all are tried"
    assert parent.plain((CHANNELS,)).regions is None, "a pipeline changes them with blocks and input"
    made = parent.make(parent.plain(EVERYTHING), 0.8)
    assert region_count(made.student) == (wanted or now) and made.predicted <= 0.8
    assert ("regions" in made.action) == bool(share)
    monkeypatch.setattr(type(context), "detector", lambda self, candidate: made.student)
    child = Parent(replace(parent.candidate, kind="morph"), parent.table, context)
    assert child.regions is None, "a student keeps those that it has"


@pytest.mark.parametrize("criterion", ["taylor", "gamma"])
def test_a_block_that_is_new_stays_in_the_cut_that_pays_for_it(parent, context, steady, criterion):
    here = replace(context, config=replace(context.config, method=Method(criterion=criterion)))
    parent = Parent(parent.candidate, parent.table, here)
    grown = add_block(parent.model, parent.topology, "backbone.body.layer2")
    made = parent.make(Recipe(grown=grown), 0.8)
    before, after = (
        dict(model.named_modules()) for model in (grown.apply(parent.model, parent.topology), made.student)
    )
    new = "backbone.body.layer2.2"
    assert new in before and new in after and made.predicted <= 0.8
    assert after[f"{new}.conv1"].out_channels == before[f"{new}.conv1"].out_channels, "as wide as it came"


def test_a_pipeline_changes_blocks_and_input_or_channels_and_not_both(parent, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(type(parent.context), "resolutions", [32, 64, 96])
    drawn = [parent.draw((STRUCTURE,), rng) for _ in range(20)]
    assert not any(recipe.channels for recipe in drawn)
    assert {recipe.min_size for recipe in drawn} == {None, 32}, "none is larger than its parent's, which is 64"
    assert any(recipe.shorter for recipe in drawn) and any(recipe.min_size for recipe in drawn)
    drawn = [parent.draw((CHANNELS,), rng) for _ in range(20)]
    assert all(recipe.channels and not (recipe.shorter or recipe.grown or recipe.min_size) for recipe in drawn)
    assert len({recipe.seed for recipe in drawn}) == 20


def test_where_the_table_was_wrong_the_student_is_made_once_more(parent, steady, timed):
    recipe, made = Recipe(), parent.make(Recipe(), 0.8)
    timed(1.01, parent.table)
    assert parent.measured(recipe, made, 0.8).rewrites == made.rewrites, "close enough"
    timed(1.15, parent.table)
    again = parent.measured(recipe, made, 0.8)
    assert again.predicted <= 0.8 / 1.15 + 0.02 < made.predicted
    assert again.latency_ratio == pytest.approx(1.15 * again.predicted)
    timed(100.0, parent.table)
    assert parent.measured(recipe, made, 0.8).rewrites == made.rewrites, "it cannot be cut so far"


def test_a_brief_timing_that_contradicts_the_table_is_taken_again_at_length(parent, steady, monkeypatch):
    made, asked = parent.make(Recipe(), 0.8), []
    found = {BRIEF: 1.0, LONG: 0.79}

    def ratio(self, screened, stage):
        asked.append(stage)
        return found[stage]

    monkeypatch.setattr(Parent, "_ratio", ratio)
    kept = parent.measured(Recipe(), made, 0.8)
    assert (kept.latency_ratio, kept.rewrites) == (0.79, made.rewrites) and asked == [BRIEF, LONG], "it is not cut more"
    found[BRIEF] = 0.79
    assert parent.measured(Recipe(), made, 0.8).latency_ratio == 0.79 and asked == [BRIEF, LONG, BRIEF]


def test_a_second_try_that_misses_the_aim_by_more_is_left(parent, steady, monkeypatch):
    made, ratios = parent.make(Recipe(), 0.8), iter((0.6, 1.0, 1.2, 0.9))
    timed = lambda self, screened, aim: replace(screened, latency_ratio=next(ratios))  # noqa: E731
    monkeypatch.setattr(Parent, "_timed", timed)
    kept = parent.measured(Recipe(), made, 0.8)
    assert kept.latency_ratio == 0.6 and kept.rewrites == made.rewrites, "faster than needed, and not too slow"
    assert parent.measured(Recipe(), made, 0.8).latency_ratio == 0.9, "of two that are too slow the nearer"


def test_features_that_are_no_numbers_are_never_preferred(parent, steady, monkeypatch):
    first, calls = parent.make(Recipe(), 0.7).architecture_id, []

    def broken(student, *given, **options):
        calls.append(student)
        return {4: math.nan if len(calls) == 1 else 0.9}

    monkeypatch.setattr(screening, "correlations", broken)
    monkeypatch.setattr(Parent, "measured", lambda self, recipe, screened, aim: screened)
    found = screen([parent], 0.7, 1, EVERYTHING, random.Random(3))
    assert len(calls) == parent.context.config.proposals and found[0][1].architecture_id != first


def test_no_student_is_proposed_that_leaves_no_pixel_of_an_image(parent, steady, monkeypatch):
    long = ("long.png", 1, parent.model.transform.max_size + 1)
    monkeypatch.setattr(type(parent.context), "image_sizes", [long])
    with pytest.raises(InputError, match=r"no student at 0\.70 of the base's latency can be made: .*long\.png"):
        screen([parent], 0.7, 1, (CHANNELS,), random.Random(0))


def test_the_better_parent_gets_more_proposals_and_its_lead_counts(monkeypatch):
    asked = []

    def make(self, recipe, aim):
        asked.append(self.candidate)
        name = f"student {len(asked)}"
        return SimpleNamespace(similarity=0.9, predicted=aim, architecture_id=name, student=torch.nn.Identity())

    recipes = dict.fromkeys(("plain", "draw"), lambda *given: None)
    context = SimpleNamespace(config=SimpleNamespace(proposals=8), progress=lambda *state: None)
    better, worse = candidate(1, map=0.4), candidate(2, map=0.3)
    parents = [SimpleNamespace(candidate=one, context=context, **recipes) for one in (better, worse)]
    for one in parents:
        one.make = lambda recipe, aim, one=one: make(one, recipe, aim)
        one.measured = lambda recipe, screened, aim: screened
    found = screen(parents, 0.5, 4, EVERYTHING, random.Random(0))
    assert asked.count(better) == 6 and asked.count(worse) == 2
    assert [origin for origin, _ in found] == [better] * 4


def test_of_students_that_are_alike_the_slower_than_aimed_at_comes_last_and_the_faster_is_no_better():
    students = [(0.9, 0.6), (0.8, 0.5), (0.79, 0.3), (0.1, 0.5)]
    made = [
        SimpleNamespace(similarity=r, predicted=predicted, architecture_id=f"{min(k, 2)}", student=None, number=k)
        for k, (r, predicted) in enumerate(students)
    ]  # the last is of the same architecture as the one before
    recipes = dict.fromkeys(("plain", "draw"), lambda *given: None)
    context, left = SimpleNamespace(config=SimpleNamespace(proposals=4), progress=lambda *state: None), iter(made)
    one = SimpleNamespace(candidate=candidate(1, kind="morph"), context=context, **recipes)
    one.make, one.measured = lambda recipe, aim: next(left), lambda recipe, screened, aim: screened
    found = screen([one], 0.5, 3, EVERYTHING, random.Random(0))
    assert [screened.number for _, screened in found] == [1, 2, 0]


def test_the_bar_of_students_ends_though_the_last_cannot_be_made():
    told, made = [], iter([SimpleNamespace(similarity=0.9, predicted=0.5, architecture_id="1", student=None)])
    context = SimpleNamespace(config=SimpleNamespace(proposals=2), progress=lambda *state: told.append(state[:3]))

    def make(recipe, aim):
        if (found := next(made, None)) is None:
            raise InputError("no cut reaches it; cut less")
        return found

    recipes = dict.fromkeys(("plain", "draw"), lambda *given: None)
    one = SimpleNamespace(candidate=candidate(1, kind="morph"), context=context, make=make, **recipes)
    one.measured = lambda recipe, screened, aim: screened
    assert len(screen([one], 0.5, 2, EVERYTHING, random.Random(0))) == 1
    assert told == [("screening students", number, 2) for number in (1, 2)]


@pytest.mark.parametrize(("kind", "order"), [("base", [0, 2, 1]), ("morph", [0, 1, 2])])
def test_of_the_bases_children_the_best_of_every_input_size_come_first_but_for_those_that_are_no_numbers(kind, order):
    students = [(0.9, 64), (0.8, 64), (0.1, 32), (math.nan, 48)]
    made = [
        SimpleNamespace(similarity=r, predicted=0.5, architecture_id=f"{k}", student=resized(size), number=k)
        for k, (r, size) in enumerate(students)
    ]
    recipes = dict.fromkeys(("plain", "draw"), lambda *given: None)
    context = SimpleNamespace(config=SimpleNamespace(proposals=4), progress=lambda *state: None)
    left = iter(made)
    one = SimpleNamespace(candidate=candidate(1, kind=kind), context=context, **recipes)
    one.make, one.measured = lambda recipe, aim: next(left), lambda recipe, screened, aim: screened
    assert [found.number for _, found in screen([one], 0.5, 3, EVERYTHING, random.Random(0))] == order


def resized(size: int) -> torch.nn.Module:
    """A detector of an input size, as far as a look at its transform tells."""
    model = torch.nn.Module()
    model.transform = GeneralizedRCNNTransform(size, 100, [0.0] * 3, [1.0] * 3)
    return model


def test_a_finalist_that_is_fast_enough_with_room_to_spare_stays_as_it_is(parent, steady, timed):
    one = Parent.__new__(Parent)
    one.__dict__ |= vars(parent) | {"candidate": candidate(1, ratio=0.5)}
    assert trimmed(one, 0.53).rewrites == () and trimmed(one, 0.53).latency_ratio == 0.5
    timed(1.0, parent.table)
    one.candidate = candidate(1, ratio=0.898)
    assert trimmed(one, 0.9).rewrites, "the next timing may find it too slow, when it is trained to the end"


def test_a_finalist_that_is_too_slow_is_cut_once_more_or_said_to_stay(parent, steady, timed):
    timed(1.0, parent.table)
    one = Parent.__new__(Parent)
    one.__dict__ |= vars(parent) | {"candidate": candidate(1, ratio=1.0)}
    cut = trimmed(one, 0.9)
    assert cut.rewrites and cut.predicted <= 0.9
    assert not timed.stages, "it is timed when it is trained"
    one.candidate = candidate(1, ratio=1.25)  # of which the table knows no more than 1
    wanted = MARGIN * 0.9 / 1.25 * parent.table.predict(parent.model)
    assert trimmed(one, 0.9).predicted <= wanted, "it is slower than predicted, and so will be what is left"
    for base, rewritten in ((True, False), (False, True)):
        own = {"architecture_id": parent.context.base_id} if base else {}
        one.candidate = candidate(1, ratio=1.0, **own)
        assert bool(trimmed(one, 1.0).rewrites) is rewritten, "the base's own ratio is not measured, and is 1"
    one.candidate = candidate(1, ratio=1.0)
    with pytest.warns(Notice, match="candidate 1 stays at 1.00 of the base's latency: no cut"):
        assert trimmed(one, 0.01).rewrites == ()


def test_without_a_change_the_parent_is_handed_on_as_it_is(parent):
    before = {name: tensor.clone() for name, tensor in parent.model.state_dict().items()}
    child = inherit(parent.model, parent.topology, (), parent.context)
    assert child.model is parent.model and [len(level) for level in child.kept] == [16] * len(child.kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in child.model.state_dict().items())


def test_a_child_keeps_its_parents_weights_and_a_fresh_one_the_architecture_alone(parent, steady):
    made = parent.make(Recipe(), 0.8)
    new, again, other = (fresh(made.student, seed) for seed in (1, 1, 2))
    name = "backbone.body.conv1.weight"  # reads nothing that was cut, so that nothing of it was repaired
    ours, base = made.student.state_dict()[name], parent.model.state_dict()[name]
    assert torch.isin(ours, base).all() and not torch.isin(new.state_dict()[name], base).any()
    assert torch.equal(new.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(new.state_dict()[name], other.state_dict()[name])
    assert architecture_of(new, "a test").id == made.architecture_id


def test_a_generation_follows_from_the_archive_alone_and_is_pure_json(asked, finished):
    one, two = asked(1)
    assert one == two and [proposal.number for proposal in one] == list(range(1, 1 + len(one)))
    assert [Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) for proposal in one] == one
    with closing(Archive(finished[0] / ARCHIVE)) as archive:
        made = [c for c in archive.candidates if c.generation == 1]
    assert [(p.action, p.parent, p.predicted) for p in one] == [(c.action, c.parent, c.predicted) for c in made]
    assert {(p.kind, p.target, p.generation, p.teacher) for p in one} == {("morph", None, 1, "base")}
    assert len({proposal.number for proposal in one}) == len(one)


def test_where_nothing_can_be_cut_any_more_the_search_goes_on_with_what_it_has(asked, monkeypatch):
    def none(*given):
        raise InputError("no student at 0.30 of the base's latency can be made: none.")

    monkeypatch.setattr(strategy, "screen", none)
    with pytest.raises(
        InputError, match=r"be made: none\. What is left .* no student gets faster than the base: search"
    ):
        asked(1)
    with pytest.warns(
        Notice, match=r"no student gets faster than 0\.\d\d of the base's latency: the parents are trained"
    ):
        made, _ = asked(3, steps=64, targets=(0.3,))
    assert made and {(p.generation, p.action, p.rewrites) for p in made} == {(2, "train on", ())}
    assert "morph" not in {p.kind for p in made}


def test_a_pipeline_distils_only_once_its_architecture_is_found(asked, finished):
    pipelined = Method(order="pipelined", teaching="base")
    exploring, _ = asked(1, method=pipelined)
    assert {proposal.teacher for proposal in exploring} == {None}
    trained_on, _ = asked(2, method=pipelined)
    assert {proposal.teacher for proposal in trained_on} == {"base"} and {p.target for p in trained_on} == {0.9}


def test_who_goes_on_alone_is_tried_with_a_teacher_and_without_and_the_better_ends_as_it_was(
    asked, finished, monkeypatch
):
    with closing(Archive(finished[0] / ARCHIVE)) as archive:
        first, last = (sum(one.generation <= done for one in archive.candidates) for done in (2, 3))
    always = Method(teaching="base")
    trial, *taught = [
        [(one.generation, one.target, one.teacher) for one in asked(count, method=method)[0]]
        for count, method in ((first, Method()), (first, always), (last, always))
    ]
    assert trial == [(3, 0.9, "base"), (3, 0.9, None)]
    assert taught == [[(3, 0.9, "base")], [(4, 0.9, "base")]]
    for teacher in (None, "base"):
        better = [replace(archive.scored[last - 1], teacher=teacher)]
        monkeypatch.setattr(Strategy, "_finalists", lambda *given, better=better: better)
        (end,), _ = asked(last)
        assert (end.generation, end.teacher, end.kind) == (4, teacher, "train"), "and keeps its optimizer"


def test_a_search_that_is_at_its_end_proposes_nothing(asked, finished):
    with closing(Archive(finished[0] / ARCHIVE)) as archive:
        everything = len(archive)
    assert asked(everything) == ([], [])


def test_no_group_is_the_bottleneck_of_the_rest_where_the_aim_is_reached_without_one(parent, steady):
    def least_kept(aim):
        (rewrite,) = parent.make(Recipe(), aim).rewrites
        return min(len(units) / parent.topology[name].units for name, units in rewrite.keep.items())

    gentle, harsh = least_kept(0.8), least_kept(0.45)
    assert harsh < screening.FLOOR <= gentle < 1
