"""A joint search in miniature, and a clock that tells it the same every time."""

import sqlite3
import warnings
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from jdkd.data import CocoDetectionDataset, resolve_splits
from jdkd.detect import read, save
from jdkd.detect.architecture import identity
from jdkd.detect.regions import region_count
from jdkd.graph import Topology
from jdkd.latency import Latency, LatencyReport, ModelLatency
from jdkd.latency.protocol import conditions_of
from jdkd.latency.table import LatencyTable
from jdkd.latency.versions import measure_table
from jdkd.notices import Notice
from jdkd.rewrite import Architecture, build
from jdkd.run_folder import RunFolder
from jdkd.search import SearchConfig, search
from jdkd.search.archive import ARCHIVE
from jdkd.search.evaluator import SearchTask
from jdkd.train.inputs import with_targets_of

DIGITS = tuple(str(digit) for digit in range(10))
REGIONS = 50  # that the base proposes
DECIDED = (
    "number, id, generation, parent, kind, action, teacher, target, architecture, map, map50, latency_ratio, "
    "predicted, lineage_steps, cycles"
)


def config_of(folder: Path, out: Path, **changes) -> SearchConfig:
    """One generation that looks for an architecture, one that trains the finalists, two that train the student."""
    train, val = resolve_splits(folder / "data")
    small = SearchConfig(
        folder / "base", train, val, out, targets=(0.9,), steps=32, candidates=2, proposals=5, batch_size=2,
        lr=1e-4, latency_rounds=2, latency_seconds=0.0, command=("jdkd", "search", "--base", "a folder"),
    )  # fmt: skip
    return replace(small, **changes)


def base_of(builder, arguments, method, folder, tmp_path, steps=24) -> SearchConfig:
    """An untrained base of a builder, as `jdkd import` leaves it, and a search from it."""
    least = {"candidates": 1, "proposals": 1, "control": False, "steps": steps, "method": method}
    config = config_of(folder, tmp_path / "out", base=tmp_path / "base", **least)
    base = build(Architecture(builder, arguments))
    base.architecture = Architecture(builder, arguments, classes=DIGITS)
    seen = with_targets_of(base, CocoDetectionDataset(config.train))
    RunFolder(config.base).begin("train", {"data": {"train": seen.fingerprint}})
    save(config.base, base)
    return config


def steady_measure(models, images, *, device, rounds, runtime, progress=None, **schedule) -> LatencyReport:
    """In place of :func:`jdkd.latency.measure`: time grows with parameters, input size and regions."""
    if progress:
        progress(rounds, rounds, {})
    taken = {name: ModelLatency(end_to_end=Latency((_time(model),) * 2 * rounds)) for name, model in models.items()}
    return LatencyReport(taken, conditions_of(torch.device(device), runtime), {})


def _time(model: torch.nn.Module) -> float:
    size = getattr(getattr(model, "transform", None), "min_size", (64,))[-1]
    share = (region_count(model) or REGIONS) / REGIONS  # of the base's regions
    counts = [parameter.numel() * (share if "roi_heads" in name else 1) for name, parameter in model.named_parameters()]
    return 1 + 1e-4 * sum(counts) * (size / 64)


def archived(out, columns=DECIDED) -> list[tuple]:
    with closing(sqlite3.connect(out / ARCHIVE)) as archive:
        return archive.execute(f"SELECT {columns} FROM candidates ORDER BY number").fetchall()


_tables: dict[str, LatencyTable] = {}
_topologies: dict[str, Topology] = {}


def remembered_table(model, topology, images, **options) -> LatencyTable:
    """In place of :func:`jdkd.latency.versions.measure_table`, once an architecture: the clock is steady."""
    name = identity(model)
    if name not in _tables:
        _tables[name] = measure_table(model, topology, images, **options)
    return _tables[name]


def remembered_topology(model, *, check=False, like=None) -> Topology:
    """In place of :func:`jdkd.detect.read`: what was checked of an architecture once."""
    name = identity(model)
    if check and name not in _topologies:
        _topologies[name] = read(model, check=True)
    return _topologies[name] if check else read(model, like=like)


def make_steady(patch) -> None:
    """Latencies that depend on the architecture alone, and the least of what takes long."""
    patch.setattr("jdkd.search.context.measure_table", remembered_table)
    patch.setattr("jdkd.search.context.read", remembered_topology)
    patch.setattr("jdkd.search.context.measure", steady_measure)
    patch.setattr("jdkd.latency.versions.measure_quick", steady_measure)
    patch.setattr("jdkd.latency.versions.SHARES", (0.5,))
    patch.setattr("jdkd.search.context.PROBE_BATCHES", 1)
    patch.setattr("jdkd.search.context.TIMING_IMAGES", 1)
    patch.setattr("jdkd.search.matching.NEIGHBOURS", 1)
    patch.setattr("jdkd.pool.shrinking.CALIBRATION_BATCHES", 1)


@dataclass(frozen=True)
class SteadyTask(SearchTask):
    """What workers are given: they train as this process does."""

    def open(self, device, progress):
        make_steady(pytest.MonkeyPatch())
        return super().open(device, progress)


def search_and_tell(config: SearchConfig, pipe) -> None:
    """A search in a process of its own, to be killed: says what it is at."""
    warnings.simplefilter("ignore", Notice)
    torch.set_num_threads(1)
    make_steady(pytest.MonkeyPatch())
    search(config, lambda what, *state: pipe.send(what))
