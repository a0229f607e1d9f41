import shutil
import warnings
from contextlib import closing
from dataclasses import replace

import pytest

from jdkd.data import CocoDetectionDataset, resolve_splits, write_digit_scenes
from jdkd.detect import save
from jdkd.notices import Notice
from jdkd.run_folder import RunFolder
from jdkd.search import Archive, Method, plan, search
from jdkd.search.archive import ARCHIVE
from jdkd.search.context import open_context
from jdkd.search.loop import _table
from jdkd.search.matching import Matching
from jdkd.search.screening import Parent
from jdkd.search.strategy import Strategy
from tests.detectors import Stage, detector, small_spec
from tests.once import made_once, shared_folder
from tests.search.rows import candidate
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


@pytest.fixture(scope="module")
def parent(context):
    """The base, to make students of."""
    with pytest.MonkeyPatch.context() as patch:
        make_steady(patch)
        return Parent(candidate(0, kind="base", map=0.4), context.latency_table(), context)


@pytest.fixture
def asked(context, finished, steady, tmp_path):
    """What a strategy proposes after the first so many candidates of the finished search."""

    def ask(count, steps=32, **changes):
        here = replace(context, config=replace(context.config, out=tmp_path, **changes))
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
        with closing(Archive(tmp_path / ARCHIVE)) as archive:
            archive.candidates = archive.candidates[:count]
            ask.context = here
            strategy = Strategy(
                here, plan(here.config, steps), Matching(here, None, archive.scored[0].map), _table(here)
            )
            return strategy.ask(archive), strategy.ask(archive)

    return ask
