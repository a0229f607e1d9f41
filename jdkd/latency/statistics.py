"""What is said about samples of time: percentiles and ratios with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jdkd.errors import InputError

LEVEL = 0.95  # of intervals, where nothing else is said


def percentile(samples: Sequence[float], percent: float) -> float:
    """Percentile of `samples` with linear interpolation between neighbours.

    Args:
        samples: at least one value.
        percent: 0 to 100.

    Returns:
        The percentile, in the unit of the samples.
    """
    return torch.quantile(torch.tensor(samples, dtype=torch.float64), percent / 100).item()


@dataclass(frozen=True)
class Latency:
    """Times of one model in one mode.

    Args:
        samples: milliseconds, two per round, in the order in which they were taken.
    """

    samples: tuple[float, ...]
    p50: float = field(init=False)
    p90: float = field(init=False)
    p99: float = field(init=False)
    iqr: float = field(init=False)

    def __post_init__(self) -> None:
        for percent in (50, 90, 99):
            object.__setattr__(self, f"p{percent}", percentile(self.samples, percent))
        spread = percentile(self.samples, 75) - percentile(self.samples, 25)
        object.__setattr__(self, "iqr", spread)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form with the percentiles (ms) and every raw sample (ms)."""
        summary = {name: getattr(self, name) for name in ("p50", "p90", "p99", "iqr", "n")}
        return {**summary, "samples": list(self.samples)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Latency:
        """Inverse of :meth:`to_json`."""
        return cls(tuple(data["samples"]))


@dataclass(frozen=True)
class Ratio:
    """Median time of one model over that of another, with an interval.

    Args:
        value, low, high: the ratio and the ends of its interval.
        level: how often such intervals hold the truth.
    """

    value: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def interval(self) -> tuple[float, float]:
        """The two ends of the interval."""
        return self.low, self.high

    @property
    def spans_one(self) -> bool:
        """Whether the two may be equally fast."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_ratio(
    model: Sequence[float],
    base: Sequence[float],
    *,
    per_round: int = 2,
    resamples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Ratio:
    """Ratio of medians with a percentile bootstrap over rounds (Efron and Tibshirani 1993, chapter 13).

    Samples of one round were taken next to each other, on the same image and under the same load, so a round
    is drawn whole and for both models at once: drift that hits both cancels instead of widening the interval.

    Args:
        model: milliseconds [rounds * per_round], round by round.
        base: milliseconds, as many and in the same order.
        per_round: samples that each round holds.
        resamples: bootstrap draws.
        seed: of the draws; equal samples give equal intervals.
        level: of the interval.

    Returns:
        The ratio of the medians and its interval.

    Raises:
        ValueError: the two lists differ in length, or are not whole rounds.
    """
    if len(model) != len(base) or len(model) % per_round or not model:
        raise ValueError(f"{len(model)} and {len(base)} samples are not the same rounds of {per_round}")
    times = torch.tensor([list(model), list(base)], dtype=torch.float64).view(2, -1, per_round)  # [2, R, per_round]
    rounds = times.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 1_000_000 // (rounds * per_round))  # bounds the memory of long runs
    found = []
    for start in range(0, resamples, chunk):
        draws = torch.randint(rounds, (min(chunk, resamples - start), rounds), generator=generator)  # [b, R]
        found.append(medians(times[:, draws].flatten(2)))  # [2, b]
    of_model, of_base = torch.cat(found, dim=1)  # [B] each
    ratios = of_model / of_base  # [B]
    low, high = ratios.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Ratio(percentile(model, 50) / percentile(base, 50), low, high, level)


def medians(samples: torch.Tensor) -> torch.Tensor:
    """Medians over the last dimension, as :func:`torch.quantile` gives them, without sorting all of it."""
    count = samples.shape[-1]
    middle = (count - 1) // 2, count // 2
    low, high = torch.from_numpy(np.partition(samples.numpy(), middle, axis=-1)[..., middle]).unbind(-1)
    return low.lerp(high, 0.5)


def ratio_over_processes(ratios: Sequence[float], *, level: float = LEVEL) -> Ratio:
    """Mean ratio of several processes, with Student's interval over them (of the logarithms).

    Where memory lies and which kernels are chosen is drawn once a process, and no number of rounds tells how much it
    matters: rounds of one process agree better with each other than with those of the next.

    Args:
        ratios: of two processes or more, one each.
        level: of the interval.

    Returns:
        The geometric mean and its interval; of two or three processes it is wide, as little is known.

    Raises:
        InputError: there are fewer than two.
    """
    from scipy.special import stdtrit  # the quantile of Student's distribution

    if len(ratios) < 2:
        raise InputError(f"an interval over processes takes at least 2 of them, got {len(ratios)}; give --processes 2.")
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    reach = float(stdtrit(len(logs) - 1, (1 + level) / 2)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), level)


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau: of all pairs of pairs, the share that agrees in order minus the share that does not."""
    products = [(a - c) * (b - d) for k, (a, b) in enumerate(pairs) for c, d in pairs[:k]]
    return statistics.fmean((each > 0) - (each < 0) for each in products) if products else math.nan
