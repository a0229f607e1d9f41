"""Every case of the harness as a test: ``python -m pytest -n 0 -s benchmarks`` checks each, and prints its rows."""

import functools

import pytest
import torch

from benchmarks import harness, record, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 0.5  # of rounds a case

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, when it loads its compiler


@functools.cache
def common() -> record.Row:
    return record.environment(DEVICE, harness.copy_bandwidth(DEVICE))


@pytest.mark.parametrize("case", run.all_cases([], DEVICE, full=False), ids=str)
def test_providers_agree_and_are_timed(case):
    rows, wrong = run.timed(case, DEVICE, SECONDS, common())
    assert rows and not wrong
