"""What the training of a candidate begins with."""

import copy

import pytest
import torch

from jdkd.pool import Subnet
from jdkd.search import Cycle, Proposal, evaluator
from jdkd.search.context import TRAINING
from jdkd.search.evaluator import Evaluator
from jdkd.search.spending import Spending
from jdkd.train.checkpoint import CHECKPOINT


@pytest.mark.parametrize(("kind", "goes_on"), [("train", True), ("teacher", False), ("morph", False)])
def test_the_optimizer_goes_on_where_student_and_teacher_stay(context, monkeypatch, tmp_path, kind, goes_on):
    parent, given = tmp_path / "001", {}
    (parent / TRAINING).mkdir(parents=True)
    (parent / TRAINING / CHECKPOINT).touch()
    monkeypatch.setattr(context, "made", lambda number: copy.deepcopy(context.base))
    monkeypatch.setattr(evaluator, "fit", lambda *positional, **how: given.update(how))
    monkeypatch.setattr(evaluator, "save", lambda folder, student: None)
    how = {"number": 2, "generation": 2, "parent": "001", "action": "train on", "rewrites": (), "teacher": None}
    proposal = Proposal(kind=kind, cycle=Cycle(2, 0, 2, 1e-3), predicted=1.0, **how)
    Evaluator(context, None)._trained(proposal, parent, Spending())
    assert given["inherit"] == (parent / TRAINING if goes_on else None)


def test_the_last_teacher_is_kept_for_who_has_the_same_of_the_same_pool(context):
    class Pool:
        def __init__(self):
            self.asked = []

        def teacher(self, teacher):
            self.asked.append(teacher)
            return copy.deepcopy(context.base)

    pool, one, other = Pool(), Subnet((1,), (1.0,)), Subnet((2,), (1.0,))
    evaluating = Evaluator(context, pool)
    kept = evaluating._teacher(one)
    assert evaluating._teacher(Subnet((1,), (1.0,))) is kept is not context.deployed_base
    assert evaluating._teacher("base") is context.deployed_base and evaluating._teacher(None) is None
    assert evaluating._teacher(one) is kept and pool.asked == [one]
    evaluating._teacher(other)
    assert evaluating._teacher(one) is not kept and pool.asked == [one, other, one], "only the last"
    evaluating.pool = Pool()
    evaluating._teacher(one)
    assert evaluating.pool.asked == [one]


def test_who_has_taught_is_as_before_for_the_next(context):
    student, teacher = copy.deepcopy(context.base).train(), copy.deepcopy(context.deployed_base)

    def facts():
        hooks = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in teacher.modules()]
        return hooks, [parameter.requires_grad for parameter in teacher.parameters()], [*vars(teacher)]

    before, weights = facts(), copy.deepcopy(teacher.state_dict())
    with Evaluator(context, None)._taught(student, teacher, None) as given:
        (losses,) = given["losses"](*next(context.probe()), 0)
        sum(losses.values()).backward()
    assert facts() == before and any(parameter.grad is not None for parameter in student.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())
