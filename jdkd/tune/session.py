"""See :func:`tune`."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jdkd import _backend, _dispatch, _tuned
from jdkd._tuned import Measured, Region
from jdkd.errors import InputError
from jdkd.files import cache_folder, claim_folder, lock_folder, unlock_folder
from jdkd.latency.clock import Clock
from jdkd.latency.protocol import LEAST_ROUNDS, Schedule, interleave
from jdkd.latency.statistics import Ratio, bootstrap_ratio
from jdkd.notices import ProgressCallback, say_once
from jdkd.tune.regions import Alone, Job, alone, plan
from jdkd.tune.shapes import Shape
from jdkd.tune.timing import clock_of, rotated

LEVEL = 0.99  # of intervals: a table has many regions
ROUNDS = 60  # of a shape at most
LOST = 1.1  # times the default's time, the whole interval above: not timed any longer
LEAST_SECONDS = 0.05  # for a shape
MOST_WARMUP = 0.5  # seconds


@dataclass
class Outcome:
    """What came of a device.

    Args:
        device: that was timed.
        file: that dispatch reads.
        regions: that are known now, by table and region.
        timed: how many of them were timed now.
        left: how many are still to be timed.
        alone: what one candidate alone can compute there, so that it was not timed.
    """

    device: torch.device
    file: Path
    regions: _tuned.Regions = field(default_factory=dict)
    timed: int = 0
    left: int = 0
    alone: list[Alone] = field(default_factory=list)

    def changed(self) -> list[tuple[str, str, Region]]:
        """Table, name and result of the regions in which another candidate than the default is taken."""
        found = ((table, name, region) for table, of in self.regions.items() for name, region in of.items())
        return [(table, name, region) for table, name, region in found if region.path != region.default]


def tune(
    devices: Sequence[torch.device],
    *,
    minutes: float = 3.0,
    quick: bool = False,
    again: bool = False,
    progress: ProgressCallback | None = None,
    clock: Clock | None = None,
    jobs: Callable[[torch.device, bool], list[Job]] = plan,
) -> list[Outcome]:
    """Times the ways to compute what the package computes, and writes the tables that choose among them from now on.

    In every region of a table all candidates that can run are checked against float64, and then timed against the one
    that runs by default: in turns, on inputs that no cache holds any more. One is taken only where the interval of its
    time over the default's lies below 1 in every shape of the region, twice. What was timed before is kept, and each
    region is written as soon as it is timed. Where one candidate alone can run there is nothing to time.

    Args:
        devices: to be timed, one after the other; each gets an equal part of the time.
        minutes: in all; regions that do not fit in keep their default, and are timed by a later run.
        quick: only the dtype that is trained in most, and no lists of channels.
        again: time what was timed before, too; until then it counts no longer.
        progress: called with the device, regions done, regions in all and what to show, after each.
        clock: what tells the time; by default that of :func:`jdkd.tune.timing.clock_of`.
        jobs: what there is to time on a device.

    Returns:
        What came of each device.

    Raises:
        InputError: ``minutes`` is no positive number, there is no folder to write to, another process writes
            there, or the environment decides what runs, whatever is measured.
    """
    folder = _claimed(minutes)
    distinct = _distinct(devices)
    share = 60 * minutes / len(distinct)
    try:
        return [
            _of_device(device, share, jobs(device, quick), again, progress, clock or clock_of(device))
            for device in distinct
        ]
    finally:
        unlock_folder(folder)


def _claimed(minutes: float) -> Path:
    """The folder of measurements, to which nobody else writes now; raises InputError before anything is timed."""
    if not (0 < minutes < math.inf):
        raise InputError(f"minutes must be a positive number, got {minutes}; give 3, say.")
    if asked := _backend.requested():
        raise InputError(
            f"the backend {asked} is asked for ({_dispatch.VARIABLE}), which decides whatever is measured; unset it."
        )
    if _backend.interpreting():
        raise InputError("TRITON_INTERPRET is set, so that kernels do not run as they do without; unset it.")
    if (root := cache_folder()) is None:
        raise InputError("there is no home folder to keep measurements in; set JDKD_CACHE to a folder.")
    folder = root / _tuned.FOLDER
    claim_folder(folder, "JDKD_CACHE")
    lock_folder(folder, "JDKD_CACHE")
    return folder


def _distinct(devices: Sequence[torch.device]) -> list[torch.device]:
    """One of the devices that are alike, since they share a file."""
    return list({_tuned.file_of(device): device for device in reversed(devices)}.values())[::-1]


def _of_device(
    device: torch.device,
    seconds: float,
    jobs: list[Job],
    again: bool,
    progress: ProgressCallback | None,
    clock: Clock,
) -> Outcome:
    known = {table: dict(of) for table, of in _tuned.regions(device).items()}
    outcome = Outcome(device, _tuned.file_of(device), known, alone=alone(jobs))
    jobs = [job for job in jobs if job.others]
    wanted = [job for job in jobs if again or job.region not in known.get(job.table, {})]
    outcome.left = len(wanted)
    forgotten = [job for job in wanted if job.region in known.get(job.table, {})]
    for job in forgotten:  # or a default's call would take a winner of before, and what is left would not be timed
        del known[job.table][job.region]
    if forgotten:
        _keep(device, known)
    deadline = time.monotonic() + seconds
    for job in wanted:
        if outcome.timed and time.monotonic() >= deadline:
            break
        share = max(0.0, deadline - time.monotonic()) / outcome.left
        known.setdefault(job.table, {})[job.region] = found = timed(job, share, clock)
        _keep(device, known)
        outcome.timed, outcome.left = outcome.timed + 1, outcome.left - 1
        if progress:
            done = len(jobs) - outcome.left
            progress(str(device), done, len(jobs), {job.table: f"{job.region}: {found.path}"})
    return outcome


def _keep(device: torch.device, regions: _tuned.Regions) -> None:
    """Writes what is known of a device, and lets every choice be made anew."""
    _tuned.write(device, regions)
    _dispatch.forget()


def timed(job: Job, seconds: float, clock: Clock) -> Region:
    """What came of a region.

    Args:
        job: the region.
        seconds: how long it may take; at least :data:`LEAST_ROUNDS` rounds of a shape are run.
        clock: what tells the time.
    """
    share = max(LEAST_SECONDS, seconds / (2 * len(job.shapes)))
    left, measured = list(job.others), {}
    for shape in job.shapes:
        if left:
            ratios = compared(shape, job.default, left, share, clock)
            measured[shape.label] = ratios
            left = [name for name in left if name in ratios and ratios[name].high < 1]
    while left:
        best = min(left, key=lambda name: math.prod(ratios[name].value for ratios in measured.values()))
        again = {shape.label: compared(shape, job.default, [best], share, clock) for shape in job.shapes}
        for label, ratios in again.items():
            measured[label] |= ratios
        if all(best in ratios and ratios[best].high < 1 for ratios in again.values()):
            return _region(job, best, measured)
        left.remove(best)
    return _region(job, job.default, measured)


def compared(shape: Shape, default: str, names: Sequence[str], seconds: float, clock: Clock) -> dict[str, Ratio]:
    """Time of candidates over that of the default, in one shape.

    Args:
        shape: what is timed.
        default: the candidate that runs without a measurement.
        names: the others; those that raise an error are left out.
        seconds: how long it may take; a quarter of that where all others are clearly slower.
        clock: what tells the time.
    """
    sets = rotated(shape.make)
    names = [name for name in names if _runs(shape, name, sets[0])]
    if not names:
        return {}
    calls = {name: partial(_run, shape.runs[name], sets) for name in (default, *names)}
    warmup = min(MOST_WARMUP, seconds / 8)
    schedule = partial(Schedule, warmup_seconds=0.0, warmup_limit=warmup, window=2, tolerance=0.1)
    first = schedule(rounds=LEAST_ROUNDS, min_seconds=0.0, max_seconds=seconds / 8)
    ratios = _ratios(calls, default, len(sets), first, clock)
    if all(ratio.low > LOST for ratio in ratios.values()):
        return ratios
    return _ratios(calls, default, len(sets), schedule(rounds=ROUNDS, min_seconds=0.0, max_seconds=seconds), clock)


def _runs(shape: Shape, name: str, inputs: Any) -> bool:
    """Whether a candidate runs on a set of inputs; what does not is said."""
    try:
        shape.runs[name](inputs)
    except Exception as error:  # whatever a compiler or a driver raises
        say_once(f"{name} of {shape.table.name} is left out: {type(error).__name__} for {shape.label}: {error}")
        return False
    return True


def _run(run: Callable[[Any], Any], sets: Sequence[Any], number: int) -> None:
    run(sets[number])


def _ratios(
    calls: Mapping[str, Callable[[int], None]], default: str, sets: int, schedule: Schedule, clock: Clock
) -> dict[str, Ratio]:
    samples, _ = interleave({"": calls}, sets, schedule, clock)
    times = samples[""]
    return {name: bootstrap_ratio(times[name], times[default], level=LEVEL) for name in times if name != default}


def _region(job: Job, path: str, measured: Mapping[str, Mapping[str, Ratio]]) -> Region:
    rows = (
        Measured(name, label, *(round(number, 4) for number in (ratio.value, ratio.low, ratio.high)))
        for label, ratios in measured.items()
        for name, ratio in ratios.items()
    )
    return Region(path, job.default, datetime.date.today().isoformat(), tuple(rows))
