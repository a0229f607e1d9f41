import warnings

import pytest

from jdkd.data import CocoDetectionDataset, resolve_splits, write_digit_scenes
from jdkd.detect import save
from jdkd.notices import Notice
from jdkd.run_folder import RunFolder
from jdkd.search.context import open_context
from tests.detectors import detector, small_spec
from tests.search.small_search import config_of, make_steady

DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A base and its data."""
    folder = tmp_path_factory.mktemp("search")
    write_digit_scenes(folder / "data", train=12, val=6, size=64, seed=0)
    train = CocoDetectionDataset(resolve_splits(folder / "data")[0])
    RunFolder(folder / "base").begin("train", {"data": {"train": train.fingerprint}})
    save(folder / "base", detector(small_spec(classes=DIGITS)))
    return folder


@pytest.fixture(scope="session")
def context(folder, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # a handful of scenes lacks some of the digits
        return open_context(config_of(folder, tmp_path_factory.mktemp("none")), lambda *state: None)


@pytest.fixture
def steady(monkeypatch):
    """A search that takes the same decisions every time, and little else."""
    make_steady(monkeypatch)
