"""What the training of a candidate begins with."""

import copy

import pytest

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
