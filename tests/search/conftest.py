import warnings

import pytest

from jdkd.data import CocoDetectionDataset, resolve_splits, write_digit_scenes
from jdkd.detect import save
from jdkd.notices import Notice
from jdkd.run_folder import RunFolder
from jdkd.search import Method, search
from jdkd.search.context import open_context
from tests.detectors import Stage, detector, small_spec
from tests.once import made_once, shared_folder
from tests.search.small_search import DIGITS, config_of, make_steady

FAMILIES = {"Faster R-CNN": detector}  # of the base that most tests begin from
STAGES = (Stage(16, ((8,),)), Stage(16, ((8,), (16,))), Stage(24, ((8,),)), Stage(32, ((8,),)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A base and its data, the same for all processes of a run of the tests."""
    folder = shared_folder(tmp_path_factory) / "search"
    made_once(folder, begun)
    return folder


def begun(folder):
    folder.mkdir()
    write_digit_scenes(folder / "data", train=12, val=6, size=64, seed=0)
    train = CocoDetectionDataset(resolve_splits(folder / "data")[0])
    RunFolder(folder / "base").begin("train", {"data": {"train": train.fingerprint}})
    save(folder / "base", FAMILIES["Faster R-CNN"](small_spec(classes=DIGITS, stages=STAGES)))


@pytest.fixture(scope="session")
def context(folder, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # a handful of scenes lacks some of the digits
        return open_context(config_of(folder, tmp_path_factory.mktemp("none")), lambda *state: None)


@pytest.fixture
def steady(monkeypatch):
    """A search that takes the same decisions every time, and little else."""
    make_steady(monkeypatch)


@pytest.fixture(scope="session")
def finished(folder):
    """Folder and result of a search that ran to its end, and what it told of its progress."""

    def searched(out):
        told = set()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)
            make_steady(patch)
            return search(config_of(folder, out), lambda what, *state: told.add(what)), told

    return folder / "out", *made_once(folder / "out", searched)


@pytest.fixture
def quick(folder):
    """Settings of a search without a pool, a teacher, a control and a choice."""
    least = {"candidates": 1, "proposals": 1, "steps": 10, "control": False, "method": Method(teaching="none")}
    return lambda out, **changes: config_of(folder, out, **least | changes)
