"""pytest-benchmark of the Pearson loss: ``python -m pytest benchmarks/test_pearson.py``."""

import pytest
import torch

from benchmarks.cases import pearson
from benchmarks.pedantic import DEVICE, runs, timed

CASES = [
    *(
        pearson.case("P3", 2, torch.float32, layout, mode, DEVICE)
        for layout in pearson.LAYOUTS
        for mode in pearson.MODES
    ),
    *(pearson.case("P3", 2, dtype, "NCHW", "tap", DEVICE) for dtype in (torch.bfloat16, torch.float16)),
    pearson.case("P3-P7", 1, torch.float32, "NCHW", "tap", DEVICE),
]


@pytest.mark.parametrize(("case", "provider"), runs(CASES))
def test_pearson(benchmark, case, provider):
    timed(benchmark, case, provider)
