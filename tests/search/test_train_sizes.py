"""At which sizes of images a search trains."""

import copy

import pytest

from jdkd.detect import detector, save
from jdkd.errors import InputError
from jdkd.run_folder import RunFolder
from jdkd.search import Cycle, Proposal, evaluator, loop, search
from jdkd.search.evaluator import Evaluator
from jdkd.search.spending import Spending
from jdkd.train.record import trained_at
from tests.search.small_search import DIGITS, config_of


def base_trained_at(folder, sizes):
    folder.mkdir()
    RunFolder(folder).begin("train", {"data": {"train": ""}, "training": {"sizes": sizes}})
    return folder


@pytest.mark.parametrize(("given", "expected"), [(None, (48, 80)), ((), ()), ((32,), (32,))])
def test_is_as_the_base_was_trained_unless_others_are_given(folder, tmp_path, monkeypatch, given, expected):
    opened = []

    def open_context(config, progress):
        opened.append(config)
        raise InputError("enough")

    monkeypatch.setattr(loop, "open_context", open_context)
    base = base_trained_at(tmp_path / "base", [48, 80])
    with pytest.raises(InputError, match="enough"):
        search(config_of(folder, tmp_path / "out", base=base, train_sizes=given))
    assert opened[0].train_sizes == expected


def test_a_base_without_such_a_record_was_trained_at_its_own(folder, tmp_path):
    assert trained_at(base_trained_at(tmp_path / "one", None)) == ()
    assert trained_at(folder / "base") == trained_at(tmp_path / "nowhere") == ()


def test_a_student_of_smaller_images_is_trained_at_sizes_in_proportion(context, monkeypatch):
    monkeypatch.setattr(context, "config", context.config.__class__(**vars(context.config) | {"train_sizes": (48, 96)}))
    seen = {}
    monkeypatch.setattr(evaluator, "fit", lambda student, data, config, **how: seen.update(sizes=config.sizes))
    monkeypatch.setattr(evaluator, "save", lambda folder, student: None)
    how = {"number": 2, "generation": 2, "parent": None, "action": "", "rewrites": (), "teacher": None, "kind": "morph"}
    for own, expected in ((64, (48, 96)), (32, (24, 48))):
        student = copy.deepcopy(context.base)
        student.transform.min_size = (own,)
        monkeypatch.setattr(evaluator, "load", lambda folder, device, student=student: student)
        Evaluator(context, None)._trained(Proposal(cycle=Cycle(2, 0, 2, 1e-3), predicted=1.0, **how), None, Spending())
        assert seen["sizes"] == expected
    assert context.training(5, seed=0).sizes == (48, 96), "the pool and the control have the base's size"
    assert context.identity()["train_sizes"] == (48, 96)


def test_searches_at_one_size_are_told_apart_as_before(context):
    assert context.training(5, seed=0).sizes is None and "train_sizes" not in context.identity()


@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")
@pytest.mark.parametrize(("sizes", "match"), [((0,), "sizes must be whole numbers"), ((48,), "leave the sizes to tra")])
def test_sizes_that_no_student_can_be_trained_at_are_refused_and_nothing_is_written(folder, tmp_path, sizes, match):
    base = tmp_path / "base"
    save(base, detector("ssdlite", backbone="mobilenet_v3_small", classes=DIGITS, min_size=64, max_size=64))
    with pytest.raises(InputError, match=match):
        search(config_of(folder, tmp_path / "out", base=base, train_sizes=sizes))
    assert not (tmp_path / "out").exists()
