"""A search with two workers in a process of its own, to be killed. Workers import this file too, and are as steady."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jdkd.data import resolve_splits
from jdkd.files import read_json, write_json
from jdkd.latency.table import LatencyTable, measure_table
from jdkd.search import SearchConfig, search
from jdkd.search.config import Method
from tests.search.small_search import steady_measure


def kept_table(*given, **options) -> LatencyTable:
    """The table of latencies that the first search of this data has measured, so that all decide alike."""
    file = FOLDER / "table_of_kills.json"
    if not file.exists():
        write_json(file, measure_table(*given, **options).to_json())
    return LatencyTable.from_json(read_json(file, "remove it"))


def make_steady(patch) -> None:
    patch.setattr("jdkd.search.context.measure", steady_measure)
    patch.setattr("jdkd.search.context.measure_table", kept_table)


def killed_config(folder: Path, out: Path, **changes) -> SearchConfig:
    """Four generations of seven candidates in all and a control, taught by the base."""
    train, val = resolve_splits(folder / "data")
    small = SearchConfig(
        folder / "base", train, val, out, targets=(0.9,), steps=60, candidates=3, proposals=3, batch_size=2, lr=1e-4,
        method=Method(teaching="base"), latency_rounds=2, latency_seconds=0.0, resume=True,
    )  # fmt: skip
    return replace(small, **changes)


FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()

if __name__ in ("__main__", "__mp_main__"):
    make_steady(pytest.MonkeyPatch())

if __name__ == "__main__":
    search(
        killed_config(FOLDER, Path(sys.argv[2]), workers=int(sys.argv[3])), lambda *told: print(*told[:3], flush=True)
    )
