"""pytest-benchmark of packing: ``python -m pytest benchmarks/test_pack.py``."""

import pytest
import torch

from benchmarks.cases import pack
from benchmarks.pedantic import DEVICE, runs, timed

CASES = [
    pack.case(0.5, torch.float32, layout, mode, DEVICE)
    for layout in pack.LAYOUTS
    for mode in ("forward+backward", "forward")
]


@pytest.mark.parametrize(("case", "provider"), runs(CASES))
def test_pack(benchmark, case, provider):
    timed(benchmark, case, provider)
