"""See :func:`measure`."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.detect import fix_roi_scales, parameter_count
from jdkd.detect.contract import identity
from jdkd.detect.input_size import require_visible
from jdkd.errors import InputError
from jdkd.latency.calls import TimedCall, backbone_replay, check_images, end_to_end, model_only
from jdkd.latency.clock import Clock, clock_for, environment, gpu_state
from jdkd.latency.folding import batch_norms
from jdkd.latency.report import LatencyReport, ModelLatency
from jdkd.latency.statistics import Latency, percentile

ProgressCallback = Callable[[int, int, dict[str, float]], None]
MODES: dict[str, Callable[[nn.Module, Sequence[Sequence[Tensor]], torch.device], TimedCall | None]] = {
    "end_to_end": end_to_end,
    "model_only": model_only,
    "backbone_replay": backbone_replay,
}


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


LEAST_ROUNDS = 5
REPORTED = Schedule()
QUICK = Schedule(
    rounds=20, min_seconds=0.0, max_seconds=20.0, warmup_seconds=0.0, warmup_limit=1.0, window=3, tolerance=0.05
)


def order(names: Sequence[str], round_index: int) -> list[str]:
    """Order of one round: A B B A, then B A A B, so that no model always goes first or follows itself.

    Args:
        names: the models.
        round_index: counts the rounds from 0.

    Returns:
        Every name twice; with more than two models the list is rotated by one each round, then mirrored.
    """
    shift = round_index % len(names)
    forward = [*names[shift:], *names[:shift]]
    return forward + forward[::-1]


def interleave(
    calls: Mapping[str, Mapping[str, TimedCall]],
    batches: int,
    schedule: Schedule,
    clock: Clock,
    progress: ProgressCallback | None = None,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Time several calls in turn: untimed until stable, then as long as the schedule asks.

    Args:
        calls: what to time, by mode and model; a round runs every call twice on one batch, mode after mode.
        batches: number of batches; rounds take them in turn.
        schedule: how long.
        clock: what tells the time.
        progress: called with (rounds done, least rounds, {}) after every round.

    Returns:
        Milliseconds by mode and model, two per round in the order taken, and how warm-up and timing went.
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

    begin, totals = time.perf_counter(), []
    while True:
        totals.append(one_round(len(totals)))
        elapsed, stable = time.perf_counter() - begin, _is_stable(totals, schedule)
        if elapsed >= schedule.warmup_limit or (stable and elapsed >= schedule.warmup_seconds):
            break
    facts: dict[str, Any] = {"warmup_rounds": len(totals), "warmup_seconds": elapsed, "stable": stable}

    for taken in (times for named in samples.values() for times in named.values()):
        taken.clear()
    begin, done = time.perf_counter(), 0
    with _no_garbage_collection():
        while not _is_enough(done, time.perf_counter() - begin, schedule):
            one_round(done)
            done += 1
            if progress:
                progress(min(done, schedule.rounds), schedule.rounds, {})
    return samples, facts | {"rounds": done, "seconds": time.perf_counter() - begin}


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
    modes: Sequence[str] = tuple(MODES),
    clock: Clock | None = None,
    progress: ProgressCallback | None = None,
) -> LatencyReport:
    """Time detectors against each other, interleaved in this process.

    The first model is the base that ratios refer to. Models are timed as they are given, so that the artefact
    that is timed is the one that is scored; pass them through :func:`jdkd.latency.fuse_for_inference` first. Use
    trained weights: the cost of NMS depends on the detections.

    Args:
        models: detectors in eval mode by name, base first; each is moved to `device`.
        images: [3, H, W] on the host, uint8 or float in 0..1; rounds take them in turn.
        device: where to measure.
        rounds, min_seconds, max_seconds, warmup_seconds, warmup_limit, window, tolerance: see
            :class:`Schedule`.
        batch_size: images per call; latencies are per call.
        modes: of `end_to_end` (images on the host to boxes on the host), `model_only` (normalised batch to
            boxes after NMS) and `backbone_replay` (CUDA graph, GPU only); a mode that a model does not have
            is left out.
        clock: what tells the time; by default CUDA events, or the wall time of the host.
        progress: called with (rounds done, least rounds, {}) after every round.

    Returns:
        Raw samples, percentiles, ratios, and what the machine and the models were.

    Raises:
        InputError: no model, no image, an image of another shape or too elongated for a model's input size, or a
            model that is in training mode or no detector.
    """
    device = torch.device(device)
    _check(models, images, batch_size, modes)
    schedule = Schedule(rounds, min_seconds, max_seconds, warmup_seconds, warmup_limit, window, tolerance)
    images = [images[index % len(images)] for index in range(max(len(images), batch_size))]
    batches = [images[start : start + batch_size] for start in range(0, len(images) - batch_size + 1, batch_size)]
    before, clock = gpu_state(device), clock or clock_for(device)
    with torch.inference_mode(), _cudnn_benchmark(device):
        for model in models.values():
            fix_roi_scales(model.to(device))
        made = {mode: {name: MODES[mode](model, batches, device) for name, model in models.items()} for mode in modes}
        calls = {mode: named for mode, named in made.items() if None not in named.values()}
        samples, run = interleave(calls, len(batches), schedule, clock, progress)
        facts = environment(device) | {"clock": clock.name}
    return LatencyReport(
        models={name: _of_model(name, model, samples) for name, model in models.items()},
        environment={**facts, "gpu_before": before, "gpu_after": gpu_state(device)},
        protocol={
            "order": "ABBA, rotated every round, modes in turn within a round",
            "batch_size": batch_size,
            "images": len(images),
            "image_sizes": sorted({f"{image.shape[1]}x{image.shape[2]}" for image in images}),
            "schedule": vars(schedule),
            "run": run,
        },
    )


def measure_quick(models: Mapping[str, nn.Module], images: Sequence[Tensor], **options: Any) -> LatencyReport:
    """:func:`measure` with few rounds, a short warm-up and end-to-end only: for candidates during a search.

    Args:
        models, images: as for :func:`measure`.
        options: override what `QUICK` and end-to-end set.

    Returns:
        The same report, with wider intervals.
    """
    return measure(models, images, **{**vars(QUICK), "modes": ("end_to_end",), **options})


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
    if unknown:
        raise InputError(f"modes has {sorted(unknown)}; known are {sorted(MODES)}")
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


def _of_model(name: str, model: nn.Module, samples: Mapping[str, Mapping[str, list[float]]]) -> ModelLatency:
    """The samples of one model, by mode."""
    taken = {mode: Latency(tuple(named[name])) for mode, named in samples.items()}
    return ModelLatency(**taken, facts=_facts(model))


def _facts(model: nn.Module) -> dict[str, Any]:
    """What a reader must know about a timed model."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    channels_last = all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    return {
        "parameters": parameter_count(model),
        "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}),
        "channels_last": channels_last,
        "batch_norms": batch_norms(model),
        "architecture": identity(model),
    }


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
def _cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose by measurement while timing on a GPU, and restore what the caller had."""
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = previous or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous
