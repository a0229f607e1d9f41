"""pytest-benchmark of the Pearson loss: ``python -m pytest benchmarks/test_pearson.py``."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.cases import pearson
from benchmarks.harness import check_agreement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [
    *(("P3", 2, torch.float32, layout, mode) for layout in pearson.LAYOUTS for mode in pearson.MODES),
    *(("P3", 2, dtype, "NCHW", "tap") for dtype in (torch.bfloat16, torch.float16)),
    ("P3-P7", 1, torch.float32, "NCHW", "tap"),
]
CASES = {str(case): case for case in (pearson.case(*size, DEVICE) for size in SIZES)}
RUNS = [
    pytest.param(name, provider, id=f"{name} {provider}".partition(" ")[2].replace(" ", "-"))
    for name, case in CASES.items()
    for provider in case.providers
]


@functools.lru_cache(maxsize=1)
def drawn(name: str) -> tuple[pearson.Inputs, list[torch.Tensor]]:
    """The inputs of a case, and what comes of them."""
    torch.manual_seed(0)
    inputs = CASES[name].make()
    return inputs, CASES[name].exact(inputs)


@pytest.mark.parametrize(("name", "provider"), RUNS)
def test_pearson(benchmark, name, provider):
    case, (inputs, exact) = CASES[name], drawn(name)
    benchmark.group = name
    benchmark.extra_info["error"] = check_agreement(case, provider, case.providers[provider](inputs), exact)

    def step() -> None:
        case.providers[provider](inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
