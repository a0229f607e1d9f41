"""See :func:`measure`."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.detect import fix_roi_scales
from jdkd.detect.input_size import require_visible
from jdkd.errors import InputError
from jdkd.latency.calls import TimedCall, check_images, end_to_end
from jdkd.latency.clock import Clock, clock_for, environment
from jdkd.latency.facts import facts_of, known_facts
from jdkd.latency.records import images_sha256, sources
from jdkd.latency.report import MODES, LatencyReport, ModelLatency
from jdkd.latency.runtimes import Artefact, Batches, Eager, Runtime
from jdkd.latency.statistics import Latency, percentile
from jdkd.latency.watching import NotWatched, Watch, watch_for

MeasuringCallback = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Args:
        rounds: at least so many rounds; each runs every model twice.
        min_seconds: and at least so long,
        max_seconds: but no longer than this, where `LEAST_ROUNDS` rounds fit in; intervals tell what it cost.
        warmup_seconds: untimed at least so long, and then until stable:
        warmup_limit: but no longer than this, in seconds; the report says whether it became stable.
        window: rounds whose median is compared with that of as many rounds before them.
        tolerance: largest relative difference of the two medians that counts as stable.

    Raises:
        InputError: one is not a number or too small.
    """

    rounds: int = 100
    min_seconds: float = 10.0
    max_seconds: float = 120.0
    warmup_seconds: float = 3.0
    warmup_limit: float = 20.0
    window: int = 10
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name in ("rounds", "window") else 0
            if not value >= least:  # NaN too
                raise InputError(f"{name} must be a number of at least {least}, got {value}; give a larger one.")


LEAST_ROUNDS = 8  # intervals of fewer hold the truth less often than they say
BLOCK_SECONDS = 1.0  # of rounds between two readings of the machine's clocks
PLACEMENTS = 4  # of every model in memory, where a runtime can open it anew
AGAIN = "the base again (A/A)"  # among the models of a round
REPORTED = Schedule()
"""How long what is reported is measured."""
QUICK = Schedule(
    rounds=20, min_seconds=0.0, max_seconds=20.0, warmup_seconds=0.0, warmup_limit=1.0, window=3, tolerance=0.05
)
"""How long a candidate is measured that may be thrown away."""


def order(names: Sequence[str], round_index: int) -> list[str]:
    """Order of one round: A B B A or B A A B, drawn anew, so that none always goes first or follows the same one.

    What ran before leaves caches and clocks behind, and what comes again after so many rounds hits who has its turn.

    Args:
        names: the models.
        round_index: counts the rounds from 0; the same one has the same order.

    Returns:
        Every name twice: all of them in a random order, and then back.
    """
    forward = random.Random(round_index).sample(names, len(names))
    return forward + forward[::-1]


def interleave(
    calls: Mapping[str, Mapping[str, TimedCall]],
    batches: int,
    schedule: Schedule,
    clock: Clock,
    progress: MeasuringCallback | None = None,
    watch: Watch | None = None,
    placed: Callable[[int], Mapping[str, Mapping[str, TimedCall]]] | None = None,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Time several calls in turn: untimed until stable, then as long as the schedule asks.

    Args:
        calls: what to time, by mode and model; a round runs every call twice on one batch, mode after mode.
        batches: number of batches; rounds take them in turn.
        schedule: how long.
        clock: what tells the time.
        progress: called with (rounds done, least rounds, {}) after every round.
        watch: reads the machine's clocks before the first round and after every block of rounds, none of which is
            timed.
        placed: called with 1, 2, ... after every :data:`PLACEMENTS`-th part of the rounds and seconds that the schedule
            asks for; gives the same calls, elsewhere in memory.

    Returns:
        Milliseconds by mode and model, two per round in the order taken, and how warm-up and timing went: with how
        often the models were placed, ``block_ends``, the rounds after which the clocks were read, and ``readings``, the
        first from before.
    """
    samples: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in named} for mode, named in calls.items()}

    def one_round(index: int) -> float:
        total = 0.0
        for mode, named in calls.items():
            for name in order(list(named), index):
                taken = clock.time(partial(named[name], index % batches))
                samples[mode][name].append(taken)
                total += taken
        return total

    totals: list[float] = []
    begin = time.perf_counter()
    while True:
        totals.append(one_round(len(totals)))
        elapsed, stable = time.perf_counter() - begin, _is_stable(totals, schedule)
        if elapsed >= schedule.warmup_limit or (stable and elapsed >= schedule.warmup_seconds):
            break
    facts: dict[str, Any] = {"warmup_rounds": len(totals), "warmup_seconds": elapsed, "stable": stable}

    for taken in (times for named in samples.values() for times in named.values()):
        taken.clear()
    readings, ends = [watch.read()] if watch else [], []
    begin, done, placements = time.perf_counter(), 0, 1
    read_at, placed_at = begin, (0, begin)
    with _no_garbage_collection():
        while not _is_enough(done, time.perf_counter() - begin, schedule):
            if placed and _is_part(done - placed_at[0], time.perf_counter() - placed_at[1], schedule):
                calls, placements = placed(placements), placements + 1
                placed_at = done, time.perf_counter()
            one_round(done)
            done += 1
            if watch and time.perf_counter() - read_at >= BLOCK_SECONDS:
                readings.append(watch.read())
                ends.append(done)
                read_at = time.perf_counter()
            if progress:
                progress(min(done, schedule.rounds), schedule.rounds, {})
    seconds = time.perf_counter() - begin
    if watch and done not in ends:
        readings.append(watch.read())
        ends.append(done)
    facts |= {"rounds": done, "seconds": seconds, "placements": placements}
    return samples, facts | {"readings": readings, "block_ends": ends}


def measure(
    models: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    *,
    device: str | torch.device = "cpu",
    rounds: int = REPORTED.rounds,
    min_seconds: float = REPORTED.min_seconds,
    max_seconds: float = REPORTED.max_seconds,
    warmup_seconds: float = REPORTED.warmup_seconds,
    warmup_limit: float = REPORTED.warmup_limit,
    window: int = REPORTED.window,
    tolerance: float = REPORTED.tolerance,
    batch_size: int = 1,
    modes: Sequence[str] = MODES,
    runtime: Runtime | None = None,
    dtype: str = "float32",
    brief: bool = False,
    score: Callable[[nn.Module], float] | None = None,
    clock: Clock | None = None,
    watch: Watch | None = None,
    progress: MeasuringCallback | None = None,
) -> LatencyReport:
    """Time detectors against each other, interleaved in this process.

    The first model is the base that ratios refer to; it takes part twice, as if it were another model, so that every
    report shows what the harness finds between equals. Models are timed as they are given, so that the artefact
    that is timed is the one that is scored; pass them through :func:`jdkd.latency.fuse_for_inference` first. Use
    trained weights: the cost of NMS depends on the detections. Where a runtime opens files, all are opened anew
    :data:`PLACEMENTS` times or more, in orders that are drawn: who is opened first lies where memory was left over, and
    is slower for it (Mytkowicz et al., ASPLOS 2009, on such bias).

    Args:
        models: detectors in eval mode by name, base first; each is moved to `device`.
        images: [3, H, W] on the host, uint8 or float in 0..1; rounds take them in turn.
        device: where to measure.
        rounds, min_seconds, max_seconds, warmup_seconds, warmup_limit, window, tolerance: see
            :class:`Schedule`.
        batch_size: images per call; latencies are per call.
        modes: of `end_to_end` (images on the host to boxes on the host) and `model_only` (normalised batch to
            boxes after NMS); a mode that a model does not have is left out.
        runtime: what runs all of them; by default torch, eagerly.
        dtype: of weights and features: `float32`, `float16` or `bfloat16`.
        brief: without the base against itself, counts of detections, memory or the machine's clocks, for a search.
        score: mAP of a detector; each is scored after all were timed, in the form in which it was timed.
        clock: what tells the time; by default CUDA events, or the wall time of the host.
        watch: what reads the machine's clocks; by default what there is, see :mod:`jdkd.latency.watching`.
        progress: called with (rounds done, least rounds, {}) after every round.

    Returns:
        Raw samples, percentiles, ratios, and what the machine and the models were.

    Raises:
        InputError: no model, no image, an image of another shape or too elongated for a model's input size, a
            model that is in training mode or no detector, or one that the runtime cannot run here.
    """
    device, runtime = torch.device(device), runtime or Eager()
    _check(models, images, batch_size, modes)
    if reason := runtime.why_not(device, dtype):
        raise InputError(f"runtime {runtime.name} in {dtype} cannot run here: {reason}.")
    schedule = Schedule(rounds, min_seconds, max_seconds, warmup_seconds, warmup_limit, window, tolerance)
    pixels = images_sha256(images)
    images = [images[index % len(images)] for index in range(max(len(images), batch_size))]
    batches = [images[start : start + batch_size] for start in range(0, len(images) - batch_size + 1, batch_size)]
    clock = clock or clock_for(device)
    watch = watch or (NotWatched("brief") if brief else watch_for(device))
    for model in models.values():  # in inference mode it would be given parameters that nothing can train
        fix_roi_scales(model.to(device))
    with torch.inference_mode(), cudnn_benchmark(device):
        artefacts, facts = {}, {}
        for name, model in models.items():
            artefacts[name] = made = runtime.prepare(model, batches, device, dtype)
            facts[name] = known_facts(model, made) if brief else facts_of(model, made, batches, device)
        if not brief:
            base = next(iter(artefacts.values()))
            artefacts[AGAIN] = base.reopen() if base.reopen else base

        def placed(count: int) -> dict[str, dict[str, TimedCall]]:
            names = order(list(artefacts), count // 2)[: len(artefacts)] if count > 1 else [*artefacts]
            for name in reversed(names) if count % 2 else names:  # each order is followed by its reverse
                if reopen := artefacts[name].reopen:
                    artefacts[name] = reopen()
            return _calls(artefacts, batches, device, modes)

        anew = placed if any(each.reopen for each in artefacts.values()) else None
        calls = _calls(artefacts, batches, device, modes)
        samples, run = interleave(calls, len(batches), schedule, clock, progress, watch, anew)
        for name in models:
            facts[name] |= {"map": score(artefacts[name].detector)} if score else {}
        conditions = conditions_of(device, runtime, clock)
    return LatencyReport(
        models={name: _of_model(name, samples, facts[name]) for name in models},
        control=None if brief else _of_model(AGAIN, samples, {}),
        environment=conditions,
        protocol={
            "runtime": runtime.name,
            "dtype": dtype,
            "order": "ABBA, drawn anew every round, modes in turn within a round",
            "batch_size": batch_size,
            "images": len(images),
            "image_sizes": sorted({f"{image.shape[1]}x{image.shape[2]}" for image in images}),
            "images_sha256": pixels,
            "schedule": vars(schedule),
            "watch": watch.name,
            "sources": sources(),
            "runs": [run],
        },
    )


def conditions_of(device: torch.device, runtime: Runtime, clock: Clock | None = None) -> dict[str, Any]:
    """What a report calls its environment."""
    clock = clock or clock_for(device)
    return environment(device) | {"clock": clock.name, "runtime": runtime.name, "runtime_version": runtime.version}


def measure_quick(models: Mapping[str, nn.Module], images: Sequence[Tensor], **options: Any) -> LatencyReport:
    """:func:`measure`, brief, with few rounds, a short warm-up and end-to-end only: for candidates during a search.

    Args:
        models, images: as for :func:`measure`.
        options: override what `QUICK` and end-to-end set.

    Returns:
        The same report, with wider intervals.
    """
    return measure(models, images, **{**vars(QUICK), "modes": ("end_to_end",), "brief": True, **options})


def _is_stable(totals: Sequence[float], schedule: Schedule) -> bool:
    """Whether the last window of round times agrees with the one before it."""
    if len(totals) < 2 * schedule.window:
        return False
    now = percentile(totals[-schedule.window :], 50)
    before = percentile(totals[-2 * schedule.window : -schedule.window], 50)
    return abs(now - before) <= schedule.tolerance * before


def _check(models: Mapping[str, nn.Module], images: Sequence[Tensor], batch_size: int, modes: Sequence[str]) -> None:
    """Raise InputError for arguments that cannot be measured."""
    check_images(images)
    if not models:
        raise InputError("models is empty; latency is measured of at least one detector")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1")
    unknown = set(modes) - set(MODES)
    if unknown or not modes:
        raise InputError(f"modes has {sorted(unknown) or 'none'}; known are {sorted(MODES)}")
    for name, model in models.items():
        require_visible(model, [(f"images[{i}]", *image.shape[1:]) for i, image in enumerate(images)])
        if model.training:
            raise InputError(
                f"model {name!r} is in training mode; pass jdkd.latency.fuse_for_inference(model) or model.eval()"
            )


def _is_enough(rounds: int, seconds: float, schedule: Schedule) -> bool:
    """Whether a measurement may end."""
    if seconds >= schedule.max_seconds and rounds >= LEAST_ROUNDS:
        return True
    return rounds >= schedule.rounds and seconds >= schedule.min_seconds


def _is_part(rounds: int, seconds: float, schedule: Schedule) -> bool:
    """Whether so much is a :data:`PLACEMENTS`-th part of a measurement."""
    if PLACEMENTS * seconds >= schedule.max_seconds:
        return True
    return PLACEMENTS * rounds >= schedule.rounds and PLACEMENTS * seconds >= schedule.min_seconds


def _calls(
    artefacts: Mapping[str, Artefact], batches: Batches, device: torch.device, modes: Sequence[str]
) -> dict[str, dict[str, TimedCall]]:
    """What is timed, by mode and model; without the modes that one of the models does not have."""
    known: dict[str, dict[str, TimedCall | None]] = {
        "end_to_end": {
            name: end_to_end(each.detector, batches, each.images_on(device)) for name, each in artefacts.items()
        },
        "model_only": {name: each.model_only for name, each in artefacts.items()},
    }
    found = {mode: {name: call for name, call in known[mode].items() if call is not None} for mode in modes}
    return {mode: calls for mode, calls in found.items() if len(calls) == len(artefacts)}


def _of_model(name: str, samples: Mapping[str, Mapping[str, list[float]]], facts: dict[str, Any]) -> ModelLatency:
    """The samples of one model, by mode."""
    return ModelLatency(**{mode: Latency(tuple(named[name])) for mode, named in samples.items()}, facts=facts)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not while timing."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose by measurement while timing on a GPU, and restore what the caller had."""
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = previous or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous
