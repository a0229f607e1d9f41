"""pytest-benchmark of a training step of a supernet: ``python -m pytest benchmarks/test_supernet_step.py``."""

import pytest
import torch

from benchmarks.cases import supernet_step
from benchmarks.pedantic import DEVICE, runs, timed

CASES = [
    supernet_step.case(detector, (64, 64), torch.float32, DEVICE, width=0.25)
    for detector in (supernet_step.R18, supernet_step.R50)
]


@pytest.mark.parametrize(("case", "provider"), runs(CASES))
def test_supernet_step(benchmark, case, provider):
    timed(benchmark, case, provider)
