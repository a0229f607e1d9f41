"""pytest-benchmark of the Pearson loss: ``python -m pytest benchmarks/test_pearson.py``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import pearson
from benchmarks.harness import Case, check_agreement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pearson.case("P3", 2, dtype, layout, "forward+backward", DEVICE, compiled=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for layout in pearson.LAYOUTS
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def inputs(case: Case) -> pearson.Inputs:
    torch.manual_seed(0)
    return case.make()


def test_providers_agree(case, inputs):
    exact = case.exact(inputs)
    for name, provider in case.providers.items():
        check_agreement(case, name, provider(inputs), exact)


@pytest.mark.parametrize("provider", CASES[0].providers)
def test_pearson(benchmark, case, inputs, provider):
    benchmark.group = str(case)

    def step() -> None:
        case.providers[provider](inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
