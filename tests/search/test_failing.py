"""A search outlives what cannot be trained or scored, and says so."""

import math
import re
from contextlib import closing

import pytest

from jdkd import train
from jdkd.detect.checkpoint import WEIGHTS
from jdkd.errors import InputError, ModelError
from jdkd.notices import Notice
from jdkd.report import write_report
from jdkd.search import search
from jdkd.search.archive import ARCHIVE, Archive
from jdkd.search.context import SearchContext
from jdkd.train import DivergenceError, engine
from tests.search.small_search import archived, config_of

pytestmark = pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice")  # a handful of scenes, 10 digits


def broken(monkeypatch, what):
    """From now on trainings of a search end as said by ``what``, by a piece of the path of their folder."""

    def fit(model, *given, folder, **options):
        fate = next((fate for piece, fate in what.items() if piece in str(folder)), "train")
        if fate == "diverge":
            raise DivergenceError("training diverged at step 1 of 1.", 1, "loss_pkd")
        report = engine.fit(model, *given, folder=folder, **options)
        model.cannot_be_scored = fate == "find nothing finite"
        return report

    def evaluate(model, *given, **options):
        if getattr(model, "cannot_be_scored", False):
            raise ModelError("nothing is left to score.")
        return train.evaluate(model, *given, **options)

    monkeypatch.setattr("jdkd.search.context.evaluate", evaluate)
    monkeypatch.setattr("jdkd.search.evaluator.fit", fit)
    monkeypatch.setattr("jdkd.search.outcome.fit", fit)


def test_a_search_outlives_a_student_that_its_runtime_cannot_run(quick, steady, tmp_path, monkeypatch):
    timed, refused = SearchContext.timed, []

    def refusing(context, models, *given, **how):
        if not refused and (context.folder(1) / WEIGHTS).exists():
            refused.append(models)
            raise InputError("onnxruntime cannot begin on the file.")
        return timed(context, models, *given, **how)

    monkeypatch.setattr(SearchContext, "timed", refusing)
    with pytest.warns(Notice, match=r"candidate 1 \(.*goes on without it: onnxruntime cannot begin"):
        result = search(quick(tmp_path / "out", steps=18, targets=(0.5,), control=False))
    rows = archived(tmp_path / "out", "number, map, latency_ratio, failure")
    assert rows[1] == (1, None, None, "onnxruntime cannot begin on the file.") and result["students"][0]["target_met"]


def test_a_search_outlives_candidates_and_a_control_that_fail(quick, steady, tmp_path, monkeypatch):
    broken(monkeypatch, {"candidates/001": "diverge", "candidates/002": "find nothing finite", "control": "diverge"})
    with pytest.warns(Notice) as said:
        result = search(quick(tmp_path / "out", steps=18, targets=(0.5,), control=True))
    words = [str(notice.message) for notice in said]
    assert any(w.startswith("candidate 1 (") and "training diverged at step 1" in w for w in words)
    assert any(w.startswith("candidate 2 (") and "nothing is left to score" in w for w in words)
    failed = archived(tmp_path / "out", "number, map, map50, latency_ratio, failure IS NULL")
    assert [row[0] for row in failed if row[1:] == (None, None, None, 0)] == [1, 2]
    with closing(Archive(tmp_path / "out" / ARCHIVE)) as archive:
        assert [one.number for one in archive.scored] == [0, 3, 4] and math.isnan(archive.candidates[1].map)
        assert archive.candidates[3].parent == archive.candidates[0].id, "where nothing else is left, the base"
        assert result["students"][0]["id"] in [one.id for one in archive.candidates[3:]]
    assert result["control"] == {"failure": "training diverged at step 1 of 1."}
    assert result["students"][0]["target_met"] and result["cost"]["control_steps"] == 0
    text = write_report(tmp_path / "out")[1].read_text()
    assert "failed: training diverged at step 1" in text and "failed: nothing is left to score" in text
    assert "The control failed: training diverged" in text and "nan" not in re.sub('base64,[^"]*', "", text)


def test_a_finalist_that_fails_is_replaced_by_the_one_it_came_from(quick, steady, tmp_path, monkeypatch):
    broken(monkeypatch, {"candidates/002": "diverge"})
    with pytest.warns(Notice, match=r"candidate 2 \(.*failed"):
        search(quick(tmp_path / "out"))
    parents = archived(tmp_path / "out", "number, parent, kind, failure IS NULL")
    assert [row[3] for row in parents] == [1, 1, 0, 1] and parents[2][1] == parents[3][1] != parents[1][1]


def test_a_search_whose_candidates_all_fail_says_why(quick, steady, tmp_path, monkeypatch):
    broken(monkeypatch, {"candidates/": "diverge"})
    says = r"all 3 candidates failed, .*diverged at step 1 of 1\. .*a lower lr than 0\.0001"
    with pytest.warns(Notice, match="goes on without it"), pytest.raises(InputError, match=says):
        search(quick(tmp_path / "out"))


def test_a_base_to_train_on_as_it_is_needs_no_optimizer_of_its_own(quick, steady, tmp_path, monkeypatch):
    broken(monkeypatch, {"candidates/001": "diverge"})
    with pytest.warns(Notice, match="goes on without it"):
        result = search(quick(tmp_path / "out", targets=(1.0,)))
    assert [row[2] for row in archived(tmp_path / "out", "number, parent, kind")] == ["base", "morph", "train", "train"]
    assert result["students"][0]["latency_ratio"] == 1.0


def test_a_pool_that_cannot_be_trained_says_what_can_be_done(folder, steady, tmp_path, monkeypatch):
    def diverge(*given, **options):
        raise DivergenceError("training diverged.", 3, "loss_box_reg")

    monkeypatch.setattr("jdkd.search.teachers.train_pool", diverge)
    with pytest.raises(InputError, match=r"at step 3 loss_box_reg is not finite; search into another folder"):
        search(config_of(folder, tmp_path / "out"))


def test_a_base_that_cannot_be_scored_costs_no_training(folder, steady, tmp_path, monkeypatch):
    def nothing(*given, **options):
        raise ModelError("nothing is left to score")

    monkeypatch.setattr("jdkd.search.context.evaluate", nothing)
    with pytest.raises(ModelError):
        search(config_of(folder, tmp_path / "out"))
    assert not (tmp_path / "out" / "pool").exists()
