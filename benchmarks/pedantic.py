"""Cases under pytest-benchmark: every provider of every case is a test, checked before it is timed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from benchmarks.harness import Case, check_agreement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_last: list[Any] = []  # the case that was drawn last, its inputs, and what comes of them


def runs(cases: Iterable[Case]) -> list[Any]:
    """Parameters ``case`` and ``provider`` of a test."""
    return [
        pytest.param(case, provider, id=f"{case} {provider}".partition(" ")[2].replace(" ", "-"))
        for case in cases
        for provider in case.providers
    ]


def timed(benchmark: Any, case: Case, provider: str) -> None:
    """Times a provider; the table says by how much it errs."""
    if not _last or _last[0] is not case:
        torch.manual_seed(0)
        inputs = case.make()
        _last[:] = case, inputs, case.exact(inputs)
    _, inputs, exact = _last
    benchmark.group = str(case)
    benchmark.extra_info["error"] = check_agreement(case, provider, case.providers[provider](inputs), exact)

    def step() -> None:
        case.providers[provider](inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
