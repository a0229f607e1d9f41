"""What a search does once, and what comes of it is what doing it again would give."""

import json
import random
from contextlib import closing, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from jdkd.data import batches
from jdkd.detect import load, save
from jdkd.morph import channel_importance
from jdkd.notices import Notice
from jdkd.search import Archive, Method, Proposal, plan, screening, strategy
from jdkd.search.archive import ARCHIVE
from jdkd.search.budget import Rung
from jdkd.search.evaluator import Evaluator
from jdkd.search.matching import Matching
from jdkd.search.screening import CHANNELS, STRUCTURE, Parent, Recipe
from jdkd.search.strategy import Strategy

EVERYTHING = STRUCTURE, CHANNELS


def test_the_probe_is_read_once_and_nobody_changes_it_for_others(context, monkeypatch):
    here, config = replace(context), context.config
    asked = [*batches(here.train, batch_size=config.batch_size, steps=3, seed=config.seed, device=config.device)]
    for images, targets in here.probe():
        for tensor in (*images, *(target["boxes"] for target in targets)):
            tensor.fill_(7)
    monkeypatch.setattr("jdkd.search.context.batches", None)
    for (images, targets), (ours, theirs) in zip(asked, here.probe(), strict=True):
        assert all(map(torch.equal, images, ours))
        assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(targets, theirs, strict=True))


@pytest.mark.parametrize(
    ("smallest", "asked", "relative"), [(1e-5, None, True), (0.02, None, False), (0.02, True, True)]
)
def test_losses_count_over_themselves_where_the_base_knows_its_images_by_heart(
    context, parent, monkeypatch, smallest, asked, relative
):
    monkeypatch.setattr("jdkd.search.context.smallest_loss", lambda model, batches: smallest)
    here = replace(context, config=replace(context.config, method=Method(relative=asked)))
    by_heart = smallest == 1e-5
    with pytest.warns(Notice, match=r"by heart .*1e-05.*--train-sizes") if by_heart else nullcontext():
        assert here.relative is relative
    several = replace(here, config=replace(here.config, train_sizes=(48, 64)))
    assert several.relative is relative, "and nothing is said"
    found = Parent(parent.candidate, parent.table, here).importance
    wanted = channel_importance(parent.model, parent.topology, "taylor", context.weighing, relative=relative)
    assert found.keys() == wanted.keys() and all(map(torch.equal, found.values(), wanted.values()))


def test_a_child_that_was_made_while_it_was_proposed_is_the_one_that_is_made_again_elsewhere(asked):
    proposal = asked(1)[1][0]
    context = asked.context
    kept, evaluator = context.children[proposal.number], Evaluator(context, None)
    assert evaluator._child(proposal, None) is kept and proposal.number not in context.children
    again = evaluator._child(Proposal.from_json(json.loads(json.dumps(proposal.to_json()))), None)
    assert again is not kept and again.architecture == kept.architecture
    ours = kept.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in kept.parameters()]
    asked(1, workers=2)
    assert not asked.context.children, "other processes make them"


def test_a_student_that_is_tried_twice_is_made_once_and_trained_from_a_copy(asked, finished, monkeypatch):
    with closing(Archive(finished[0] / ARCHIVE)) as archive:
        before = sum(one.generation <= 2 for one in archive.candidates)
    cut = lambda parent, target: parent.make(Recipe(), 0.9 * parent.table.predict(parent.model))  # noqa: E731
    monkeypatch.setattr(strategy, "trimmed", cut)
    proposals = asked(before)[1]
    context = asked.context
    evaluating, folder = Evaluator(context, None), context.folder(int(proposals[0].parent[:3]))
    assert [proposal.teacher for proposal in proposals] == ["base", None] and all(p.rewrites for p in proposals)
    taught, untaught = (evaluating._child(proposal, folder) for proposal in proposals)
    again = evaluating._child(proposals[0], folder)
    assert taught is not untaught and not context.children and again not in (taught, untaught)
    held = [{tensor.data_ptr() for tensor in child.parameters()} for child in (taught, untaught, again)]
    assert held[0].isdisjoint(held[1])
    for child in (untaught, again):
        assert child.architecture == taught.architecture and child.training is taught.training
        assert all(torch.equal(child.state_dict()[name], tensor) for name, tensor in taught.state_dict().items())


def test_targets_that_share_a_finalist_share_what_is_known_of_it(parent, context, steady, monkeypatch):
    weighed, own, rung = [], screening.channel_importance, Rung((0.85, 0.75), False, 1, 10, trial=True)
    noted = lambda *given, **how: weighed.append(given[0]) or own(*given, **how)  # noqa: E731
    monkeypatch.setattr(screening, "channel_importance", noted)
    monkeypatch.setattr(Strategy, "_finalists", lambda *given: [parent.candidate])
    asking = Strategy(context, plan(context.config, 32), Matching(context, None, 0.4), parent.table)

    def made(*aims):
        archive = SimpleNamespace(scored=[parent.candidate])
        return asking._trained_on(replace(rung, aims=aims), archive, random.Random(0))

    together = [(one.rewrites, one.predicted) for _, _, one, *_ in made(0.85, 0.75)]
    assert len(weighed) == 1 and len({repr(rewrites) for rewrites, _ in together}) == 2
    assert together == [(one.rewrites, one.predicted) for aim in rung.aims for _, _, one, *_ in made(aim)]
    assert len(weighed) == 3


def test_what_a_latency_is_predicted_from_is_the_same_of_a_child_and_of_its_folder(parent, steady, tmp_path):
    for number in range(6):
        child = parent.make(parent.draw(EVERYTHING, random.Random(number)), 0.8).student
        save(tmp_path, child)
        made, read = (parent.table.features(detector) for detector in (child, load(tmp_path)))
        assert [*made.items()] == [*read.items()], "in one order too, as they are added up"
