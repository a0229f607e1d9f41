"""pytest-benchmark of the elastic convolution: ``python -m pytest benchmarks/test_elastic_conv.py``."""

import pytest
import torch

from benchmarks.cases import elastic_conv
from benchmarks.harness import Case, check_agreement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    elastic_conv.case(elastic_conv.P3, width, listed, torch.float32, mode, DEVICE)
    for width, listed in ((1.0, False), (0.5, False), (0.5, True))
    for mode in ("forward", "forward+backward")
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def given(case: Case) -> elastic_conv.Inputs:
    torch.manual_seed(0)
    return case.make()


def test_providers_agree(case, given):
    exact = case.exact(given)
    for name, provider in case.providers.items():
        check_agreement(case, name, provider(given), exact)


@pytest.mark.parametrize("provider", CASES[0].providers)
def test_elastic_conv(benchmark, case, given, provider):
    benchmark.group = str(case)

    def step() -> None:
        case.providers[provider](given)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
