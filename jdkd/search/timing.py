"""How fast an architecture is: every measurement of it in a search, pooled into one ratio to the base."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jdkd.errors import InputError
from jdkd.latency import Latency, Ratio, bootstrap_ratio, percentile

BRIEF = "brief"  # every candidate
LONG = "long"  # who is to be trained on: what is too slow is cut while it can still learn
FINAL = "final"  # as long, who may be the student


@dataclass(frozen=True)
class Timing:
    """One measurement of an architecture in turn with the base.

    Args:
        architecture_id: the architecture.
        stage: :data:`BRIEF`, :data:`LONG` or :data:`FINAL`.
        environment: device, threads and versions, as :mod:`jdkd.latency` reports them.
        samples, base_samples: milliseconds end to end, two per round, in the order in which they were taken.

    Raises:
        InputError: a sample is no time.
    """

    architecture_id: str
    stage: str
    environment: dict[str, Any]
    samples: tuple[float, ...]
    base_samples: tuple[float, ...]

    def __post_init__(self) -> None:
        for ms in (*self.samples, *self.base_samples):
            if not 0 < ms < math.inf:
                raise InputError(f"a detector was timed at {ms} ms; mend the clock of this machine, then resume.")

    @property
    def machine(self) -> str:
        """Where it was taken; timings of two machines are not pooled."""
        return machine_of(self.environment)


def machine_of(environment: dict[str, Any]) -> str:
    """What a latency depends on besides the model: processor or GPU, threads, torch, what runs the detector."""
    threads = [f"{environment['threads']} threads"] if environment["device"] == "cpu" else []
    runs = f"{environment['runtime']} {environment['runtime_version']}"
    return ", ".join([environment["device_name"], *threads, f"torch {environment['torch']}", runs])


@dataclass(frozen=True)
class PooledLatency:
    """What all measurements of one architecture say together.

    Args:
        own, base: times of the architecture and of the base, in ms.
    """

    own: Latency
    base: Latency

    @property
    def value(self) -> float:
        """The ratio of their medians."""
        return self.own.p50 / self.base.p50

    @cached_property
    def ratio(self) -> Ratio:
        """The same with its 95 % interval, which takes thousands of draws."""
        return bootstrap_ratio(self.own.samples, self.base.samples)

    def milliseconds(self, beside: "PooledLatency") -> dict[str, float]:
        """Percentiles of the architecture's time, in ms, at the speed that the machine had in other measurements.

        Args:
            beside: these; the base took their median then, so that what stands beside them may be compared with them.
        """
        scale = beside.base.p50 / self.base.p50
        return {name: scale * getattr(self.own, name) for name in ("p50", "p90", "p99")}


def pooled(timings: Sequence[Timing]) -> PooledLatency:
    """The ratio of medians over all samples of one architecture on one machine.

    For one measurement this is the ratio that :class:`jdkd.latency.LatencyReport` gives. Between two measurements a
    machine's speed may drift, which hits base and student alike: each is scaled to the base's median in the latest.

    Args:
        timings: at least one, the latest last.
    """
    medians = [percentile(timing.base_samples, 50) for timing in timings]
    scales = [medians[-1] / median for median in medians]

    def scaled(name: str) -> Latency:
        return Latency(tuple(ms * k for timing, k in zip(timings, scales, strict=True) for ms in getattr(timing, name)))

    return PooledLatency(scaled("samples"), scaled("base_samples"))
