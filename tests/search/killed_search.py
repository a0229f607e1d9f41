"""A search with two workers in a process of its own, to be killed: says what it is at."""

import sys
from pathlib import Path

import pytest

from jdkd.search import Method, SearchConfig, search
from tests.search.small_search import SteadyTask, config_of, make_steady


def killed_config(folder: Path, out: Path, **changes) -> SearchConfig:
    """Four generations of seven candidates in all, and a control; taught by the base."""
    small = {"candidates": 3, "proposals": 3, "steps": 60, "method": Method(teaching="base"), "resume": True}
    return config_of(folder, out, **small | changes)


def make_workers_steady(patch) -> None:
    make_steady(patch)
    patch.setattr("jdkd.search.loop.SearchTask", SteadyTask)


if __name__ == "__main__":
    make_workers_steady(pytest.MonkeyPatch())
    config = killed_config(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
    search(config, lambda *told: print(*told[:3], flush=True))
