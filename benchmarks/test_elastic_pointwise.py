"""pytest-benchmark of a 1x1 convolution and what follows: ``python -m pytest benchmarks/test_elastic_pointwise.py``."""

import pytest
import torch

from benchmarks.cases import elastic_pointwise
from benchmarks.pedantic import DEVICE, runs, timed

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, when it loads its compiler
CASES = [
    elastic_pointwise.case(label, 0.5, torch.float32, mode, DEVICE, images=1)
    for label in ("layer2 1x1 128->512", "layer4 1x1 512->2048")
    for mode in elastic_pointwise.MODES
]


@pytest.mark.parametrize(("case", "provider"), runs(CASES))
def test_elastic_pointwise(benchmark, case, provider):
    timed(benchmark, case, provider)
