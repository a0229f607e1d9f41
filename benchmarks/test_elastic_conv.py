"""pytest-benchmark of the elastic convolution: ``python -m pytest benchmarks/test_elastic_conv.py``."""

import pytest
import torch

from benchmarks.cases import elastic_conv
from benchmarks.pedantic import DEVICE, runs, timed

CASES = [
    elastic_conv.case(label, width, listed, torch.float32, mode, DEVICE)
    for label in (elastic_conv.P3, "layer3 1x1 1024->256")
    for width, listed in ((1.0, False), (0.5, False), (0.5, True))
    for mode in elastic_conv.MODES
]


@pytest.mark.parametrize(("case", "provider"), runs(CASES))
def test_elastic_conv(benchmark, case, provider):
    timed(benchmark, case, provider)
