"""The archive as an Optuna study, and logs and archive as TensorBoard's events."""

import json
import math
import sqlite3
from contextlib import closing

import pytest

from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.report import Mirrors, read_outcome
from jdkd.search.archive import Archive
from tests.report.made_up import add, make_search


@pytest.fixture
def folder(tmp_path):
    return make_search(tmp_path / "search", count=7)


class TestOptuna:
    @pytest.fixture
    def mirrored(self, folder, tmp_path):
        """Mirrors the search as it is now, and the trials that the study then has."""
        pytest.importorskip("optuna", reason="optuna is not installed")
        from jdkd.report.optuna import mirror_to_optuna

        return lambda: mirror_to_optuna(read_outcome(folder), f"sqlite:///{tmp_path / 'study.db'}").trials

    def test_trials_are_the_candidates(self, mirrored, folder):
        trials, candidates = mirrored(), read_outcome(folder).candidates
        for trial, one in zip(trials, candidates, strict=True):
            assert trial.user_attrs["candidate"] == one.id and trial.user_attrs["action"] == one.action
            assert trial.user_attrs["parent"] == one.parent
            assert (trial.params["kind"], trial.params["steps"]) == (one.kind, one.steps)
            assert trial.params["generation"] == one.generation and trial.params.get("target") == one.target
            assert trial.params.get("teacher") == (None if one.teacher is None else str(one.teacher))
            if one.failure is None:
                assert trial.values == [one.map, one.latency_ratio] and trial.state.name == "COMPLETE"
                assert trial.user_attrs["latency_interval"] == list(one.latency_interval)
            else:
                assert trial.state.name == "FAIL" and trial.user_attrs["failure"] == one.failure
        assert sum(trial.state.name == "FAIL" for trial in trials) == 1

    def test_mirroring_again_adds_what_is_new_and_nothing_twice(self, mirrored, folder):
        first = [trial.datetime_complete for trial in mirrored()]
        assert [trial.datetime_complete for trial in mirrored()] == first
        with closing(Archive(folder / "archive.sqlite")) as archive:
            add(archive, 7, 0.5, 0.5, 0, teacher=archive.candidates[1].teacher)
        trials = mirrored()
        assert [trial.datetime_complete for trial in trials[:7]] == first and len(trials) == 8

    def test_what_was_measured_anew_and_new_teachers_are_brought_up_to_date(self, mirrored, folder):
        mirrored()
        with closing(Archive(folder / "archive.sqlite")) as archive:
            add(archive, 7, 0.5, 0.5, 0, teacher="one that nobody knew")
            one = archive.candidates[1]
            again = archive.timings(one.architecture_id)[0]
            archive.add_timing(type(again)(again.architecture_id, "long", again.environment, (2.0,) * 40, (20.0,) * 40))
        trials = mirrored()
        changed = read_outcome(folder).candidates[1]
        assert changed.latency_ratio != one.latency_ratio and trials[1].values[1] == changed.latency_ratio
        assert trials[7].params["teacher"] == "one that nobody knew" and len(trials) == 8

    def test_objectives_have_names_and_directions(self, mirrored, tmp_path):
        mirrored()
        import optuna

        study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
        assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
        assert study.metric_names == ["mAP", "latency_ratio"]

    def test_a_study_of_something_else_is_left_alone(self, mirrored, tmp_path):
        import optuna

        storage = f"sqlite:///{tmp_path / 'study.db'}"
        study = optuna.create_study(storage=storage, study_name="search", directions=["maximize", "minimize"])
        study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
        with pytest.raises(InputError, match=r"^sqlite:\S+ holds a study 'search' that is no mirror of this search"):
            mirrored()
        assert len(study.trials) == 1

    def test_the_study_of_another_search_from_the_same_base_is_left_alone(self, mirrored, folder):
        assert len(mirrored()) == 7
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"started": "2001-01-01T00:00:00+00:00"}))
        with pytest.raises(InputError, match=r"holds a study 'search' that is no mirror of this search"):
            mirrored()
        (folder / "run.json").write_text(json.dumps(record))
        assert len(mirrored()) == 7

    def test_a_run_outlives_a_database_that_somebody_else_has_locked(self, mirrored, folder, tmp_path):
        mirrored()
        file = tmp_path / "study.db"
        with closing(Archive(folder / "archive.sqlite")) as archive:
            add(archive, 7, 0.5, 0.5, 0)
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            mirrors = Mirrors(folder, f"sqlite:///{file}?timeout=0.1")
            with pytest.raises(InputError, match=r"study\.db\S* cannot hold an Optuna study .*database is locked"):
                mirrors.show(read_outcome(folder))
            with pytest.warns(Notice, match=r"the run goes on, but is not mirrored: sqlite.*database is locked"):
                mirrors.update()
        mirrors.update()
        assert len(mirrored()) == 8

    @pytest.mark.parametrize("storage", ["nonsense", "sqlite:////nowhere/at/all.db", "foo://x"])
    def test_a_storage_that_cannot_be_used_is_named(self, folder, storage):
        pytest.importorskip("optuna", reason="optuna is not installed")
        with pytest.raises(InputError, match=f"{storage} cannot hold an Optuna study"):
            Mirrors(folder, storage).show(read_outcome(folder))
        with pytest.warns(Notice, match="the run goes on, but is not mirrored"):
            Mirrors(folder, storage).update()


class TestTensorBoard:
    @pytest.fixture
    def scalars(self, folder):
        """What a run's scalar is by step, as TensorBoard reads the folder of events."""
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

        def read(run, name):
            events = EventMultiplexer().AddRunsFromDirectory(str(folder / "tensorboard")).Reload()
            return [(event.step, event.value) for event in events.Scalars(run, name)]

        return read

    @pytest.fixture
    def log(self, folder):
        file = folder / "candidates/003/training/log.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(_line(1) + _line(2) + _line(3)[:20])  # a crash, or the very moment, cut the last one short
        return file

    def test_scores_and_steps_of_candidates_are_there_by_number(self, scalars, folder):
        Mirrors(folder, tensorboard=True).close()
        candidates = read_outcome(folder).candidates
        expected = [(one.number, pytest.approx(one.map)) for one in candidates if one.failure is None]
        assert scalars("search", "candidates/mAP") == expected and len(expected) == 6
        assert [step for step, _ in scalars("search", "candidates/steps")] == [*range(7)]

    def test_trainings_are_runs_and_lines_that_come_later_are_added(self, scalars, folder, log):
        mirrors = Mirrors(folder, tensorboard=True)
        mirrors.update()
        run = "candidates/003/training"
        assert scalars(run, "losses/box") == [(1, 1.0), (2, 0.5)]
        log.write_text(_line(1) + _line(2) + _line(3) + _line(4))
        mirrors.close()
        assert [step for step, _ in scalars(run, "losses/box")] == [1, 2, 3, 4]
        assert scalars(run, "lr") == [(step, pytest.approx(0.01)) for step in (1, 2, 3, 4)]

    def test_a_log_that_no_training_wrote_is_left_out_and_ends_no_run(self, scalars, folder, log):
        strange = folder / "notes" / "log.jsonl"
        strange.parent.mkdir()
        strange.write_text('bought milk\n[1, 2]\n{"lr": 0.5}\n{"step": "one", "lr": 0.5}\n')
        log.write_text(_line(1) + "\0\0\0\n" + _line(2))
        Mirrors(folder, tensorboard=True).close()
        assert [step for step, _ in scalars("candidates/003/training", "lr")] == [1, 2]
        assert not (folder / "tensorboard" / "notes").exists()

    def test_a_run_outlives_whatever_a_mirror_raises(self, folder, monkeypatch):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        mirrors = Mirrors(folder, tensorboard=True)
        monkeypatch.setattr(mirrors.board, "_add_candidates", lambda outcome: 1 / 0)
        with pytest.warns(Notice, match="the run goes on, but is not mirrored: ZeroDivisionError: division by zero"):
            mirrors.update()

    def test_mirroring_anew_writes_nothing_twice(self, scalars, folder, log):
        for _ in range(2):
            Mirrors(folder, tensorboard=True).close()
        assert len(scalars("search", "candidates/mAP")) == 6
        assert len(scalars("candidates/003/training", "lr")) == 2

    def test_a_folder_that_no_run_has_taken_yet_stays_empty(self, tmp_path):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        Mirrors(tmp_path, tensorboard=True).update()
        assert not [*tmp_path.iterdir()]


def _line(step):
    return json.dumps({"step": step, "lr": 0.01, "grad_norm": math.inf, "losses": {"box": 1 / step}}) + "\n"
