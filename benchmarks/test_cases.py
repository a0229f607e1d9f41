"""Every provider of every case under pytest-benchmark: ``python -m pytest -n 0 benchmarks``.

The harness measures a case, all its providers in turn; pytest-benchmark is told the samples, and prints, saves and
compares them in its own way (``--benchmark-save``, ``--benchmark-compare``).
"""

import functools
import warnings
from collections.abc import Iterator

import pytest
import torch

from benchmarks import harness, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 0.5  # of rounds a case
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it loads its compiler
    CASES = list(run.all_cases([], DEVICE, full=False))

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


class Replay:
    """A clock between whose readings, two by two, the given samples pass."""

    def __init__(self) -> None:
        self.now, self.passing = 0.0, False
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        self.now += next(self.samples) if self.passing else 0.0
        self.passing = not self.passing
        return self.now


CLOCK = Replay()


@functools.lru_cache(maxsize=1)
def measured(number: int) -> tuple[dict[str, harness.Timing], dict[str, str]]:
    """Timings of a case by provider, and what is wrong with those that have none."""
    wrong: dict[str, str] = {}
    return {timing.provider: timing for timing in harness.measure(CASES[number], DEVICE, SECONDS, wrong)}, wrong


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("number", "provider"),
    [
        pytest.param(number, provider, id=f"{case} {provider}".replace(" ", "-"))
        for number, case in enumerate(CASES)
        for provider in case.providers
    ],
)
def test_is_right_and_timed(benchmark, number, provider):
    timings, wrong = measured(number)
    assert provider not in wrong, wrong[provider]
    if provider not in timings:
        pytest.skip(f"{provider} does not run {CASES[number]} here, and need not")
    timing = timings[provider]
    CLOCK.samples = iter(timing.seconds)
    benchmark.group = str(CASES[number])
    benchmark.extra_info["error"] = timing.error
    benchmark.pedantic(lambda: None, rounds=len(timing.seconds))
    assert benchmark.disabled or benchmark.stats.stats.median == pytest.approx(timing.median)
