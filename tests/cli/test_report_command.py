import sys
from types import SimpleNamespace

import pytest

from jdkd.run_folder import RunFolder
from tests.report.made_up import make_search


def test_report_is_written_of_a_finished_and_of_a_running_search(jdkd, tmp_path):
    for finished in (True, False):
        folder = make_search(tmp_path / str(finished), finished=finished, count=7)
        answer = jdkd("report", folder)
        assert answer.code == 0, answer.err
        assert answer.out.splitlines()[-2:] == [str(folder / "pareto.png"), str(folder / "report.html")]
        told = "was asked for" if finished else "This search is not finished: 6 candidates in 2 generations"
        assert told in answer.out and (folder / "report.html").is_file()


def test_report_of_what_is_no_search_is_refused(jdkd, tmp_path):
    answer = jdkd("report", tmp_path / "nowhere")
    assert answer.code == 2 and "archive.sqlite does not exist" in answer.err
    RunFolder(tmp_path / "train").begin("train", {})
    answer = jdkd("report", tmp_path / "train")
    assert answer.code == 2 and "holds a `jdkd train`, and a report is made of a search" in answer.err


@pytest.mark.parametrize("kind", ["train", "distill", "swap"])
def test_of_whatever_trained_one_detector_the_events_are_written(jdkd, tmp_path, monkeypatch, kind):
    RunFolder(tmp_path).begin(kind, {})
    shown = []
    board = SimpleNamespace(update=shown.append, close=lambda: None, where=tmp_path / "tensorboard")
    monkeypatch.setattr("jdkd.report.mirrors.TensorBoardMirror", lambda folder: board)
    answer = jdkd("report", tmp_path, "--tensorboard")
    assert (answer.code, answer.out.strip()) == (0, str(board.where)), answer.err
    assert shown == [None]


@pytest.mark.parametrize(
    ("flag", "package"), [(("--optuna", "sqlite:///a.db"), "optuna"), (("--tensorboard",), "tensorboard")]
)
def test_a_mirror_whose_package_is_missing_is_refused_with_its_extra(jdkd, tmp_path, monkeypatch, flag, package):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard", "optuna"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    folder = make_search(tmp_path / "search", count=2)
    answer = jdkd("report", folder, *flag)
    assert answer.code == 2 and f"pip install 'jdkd[{package}]'" in answer.err
    assert not (folder / "report.html").exists()
