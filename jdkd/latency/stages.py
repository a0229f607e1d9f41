"""See :func:`profile_stages`: where the time of a detector goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.detect.stages import FIXED, STAGES, stages_of
from jdkd.errors import InputError
from jdkd.latency.calls import TimedCall, check_images, end_to_end
from jdkd.latency.roofline import Ceilings, Roofline, measured_ceilings
from jdkd.latency.statistics import percentile

AGREES = 0.1  # largest relative difference between the sum of the stages and the time without stopwatch


@dataclass(frozen=True)
class StageProfile:
    """Where the time of one call goes.

    Args:
        stages: milliseconds of each of :data:`jdkd.detect.stages.STAGES`.
        whole: milliseconds of the same call without a stopwatch in it, in turn with it.
        least: milliseconds that each stage takes at least, see :class:`jdkd.latency.roofline.Roofline`.
        ceilings: of the device, by which these were found.
    """

    stages: dict[str, float]
    whole: float
    least: dict[str, float]
    ceilings: Ceilings

    @property
    def sums_up(self) -> bool:
        """Whether the stages add up to the time without a stopwatch, within 10 %."""
        return abs(sum(self.stages.values()) - self.whole) <= AGREES * self.whole

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"stages": self.stages, "sum": sum(self.stages.values()), "whole": self.whole, "sums_up": self.sums_up}
        return found | {"least": self.least, "ceilings": asdict(self.ceilings)}


class Stopwatch:
    """Counts time for whichever stage was entered last and not yet left.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._last, self._open = now, 0.0, [FIXED]
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @property
    def stage(self) -> str:
        """The one that time counts for."""
        return self._open[-1]

    def start(self) -> None:
        """Forget all, and begin with what is fixed."""
        self.seconds, self._open, self._last = dict.fromkeys(STAGES, 0.0), [FIXED], self._now()

    def lap(self) -> None:
        """Count until now."""
        now = self._now()
        self.seconds[self.stage] += now - self._last
        self._last = now

    def within(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, whose time counts for a stage."""

        def timed(*given: Any, **named: Any) -> Any:
            self.lap()
            self._open.append(stage)
            try:
                return call(*given, **named)
            finally:
                self.lap()
                self._open.pop()

        return timed


def profile_stages(
    model: nn.Module,
    images: Sequence[Tensor],
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    rounds: int = 20,
    now: Callable[[], float] | None = None,
    ceilings: Ceilings | None = None,
) -> StageProfile:
    """Divide the time from images on the host to boxes on the host among the stages of a detector, run eagerly.

    Beside the time of each stage stands the least that its operators would take, one after the other, if each ran at
    what the device does at most (Williams et al., Roofline, CACM 2009).

    Calls with and without a stopwatch take turns; both are means over the middle half of the calls by their time.
    On a GPU the stopwatch waits for the device at the ends of every stage, so that launches no longer overlap.

    Args:
        model: a detector in eval mode, as :func:`jdkd.latency.fuse_for_inference` returns it.
        images: [3, H, W] on the host, uint8 or float in 0..1.
        device: where to measure.
        batch_size: images a call.
        rounds: calls of each kind, after two untimed ones.
        now: tells the time in seconds; by default the host's, with the GPU idle.
        ceilings: what the device does at most; by default they are measured, which takes about a second.

    Raises:
        InputError: there is no telling which module is the backbone, or nothing to measure on.
    """
    device = torch.device(device)
    check_images(images)
    if rounds < 1 or batch_size < 1:
        raise InputError(f"rounds is {rounds} and batch_size {batch_size}; give at least 1 of each.")
    batch = [
        images[index % len(images)] for index in range(-(-max(len(images), batch_size) // batch_size) * batch_size)
    ]
    batches = [batch[start : start + batch_size] for start in range(0, len(batch), batch_size)]
    stopwatch = Stopwatch(now or _idle_time(device))
    call = end_to_end(model.to(device), batches, device)
    plain, divided = [], []
    with torch.inference_mode():
        for number in range(rounds + 2):
            stopwatch.start()
            call(number % len(batches))
            stopwatch.lap()
            plain.append(sum(stopwatch.seconds.values()))
            with _hooked(model, stopwatch):
                stopwatch.start()
                call(number % len(batches))
                stopwatch.lap()
            divided.append(stopwatch.seconds)
    kept = _middle(divided[2:], [sum(each.values()) for each in divided[2:]])
    whole = _middle(plain[2:], plain[2:])
    stages = {stage: 1e3 * sum(each[stage] for each in kept) / len(kept) for stage in STAGES}
    ceilings = ceilings or measured_ceilings(device)
    return StageProfile(stages, 1e3 * sum(whole) / len(whole), _least(model, call, len(batches), ceilings), ceilings)


def _least(model: nn.Module, call: TimedCall, batches: int, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds that each stage takes at least, mean over batches."""
    stopwatch = Stopwatch(lambda: 0.0)
    with torch.no_grad(), _hooked(model, stopwatch), Roofline(ceilings, lambda: stopwatch.stage) as found:
        for number in range(batches):
            call(number)
    return {stage: 1e3 * seconds / batches for stage, seconds in found.seconds.items()}


@contextmanager
def _hooked(model: nn.Module, stopwatch: Stopwatch) -> Iterator[None]:
    """Lets a stopwatch count the calls of every stage for a while."""
    places = stages_of(model)
    before = [vars(owner).get(name) for owner, name, _ in places]  # None: the class's own
    for owner, name, stage in places:
        setattr(owner, name, stopwatch.within(stage, getattr(owner, name)))
    try:
        yield
    finally:
        for (owner, name, _), own in zip(places, before, strict=True):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _idle_time(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def idle() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return idle


def _middle(values: Sequence[Any], sizes: Sequence[float]) -> list[Any]:
    """Those whose size is between the quartiles; all where no size is."""
    low, high = percentile(sizes, 25), percentile(sizes, 75)
    return [value for value, size in zip(values, sizes, strict=True) if low <= size <= high] or list(values)
