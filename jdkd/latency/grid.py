"""See :func:`measure_grid`: the same models in several runtimes, dtypes and batch sizes, over several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.latency.protocol import MODES, REPORTED, MeasuringCallback, Schedule, measure
from jdkd.latency.report import LatencyReport, pooled
from jdkd.latency.runtimes import Runtime, require_runnable

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Grid:
    """What is measured: every runtime in every dtype at every batch size.

    Args:
        runtimes: names.
        dtypes: of weights and features.
        batch_sizes: images a call.
        modes: see :func:`jdkd.latency.measure`.
        schedule: of each measurement.
        processes: how often all of it is repeated, each time in a fresh process; once in this one.

    Raises:
        InputError: there is nothing to measure.
    """

    runtimes: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    batch_sizes: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = MODES
    schedule: Schedule = REPORTED
    processes: int = 1

    def __post_init__(self) -> None:
        for flag, names in (("--runtimes", self.runtimes), ("--dtypes", self.dtypes)):
            if isinstance(names, str) or not names:
                raise InputError(f"{flag} is {names!r}; give at least one name, in a list.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            given = " ".join(map(str, self.batch_sizes)) or "empty"
            raise InputError(f"--batch-sizes is {given}; give whole numbers of at least 1.")
        if self.processes < 1:
            raise InputError(f"--processes is {self.processes}; measure in at least 1 process.")
        if not self.modes or set(self.modes) - set(MODES):
            raise InputError(f"--modes is {' '.join(self.modes) or 'empty'}; known are {', '.join(MODES)}.")

    def cells(self) -> list[tuple[str, str, int]]:
        """Runtime, dtype and batch size of every measurement, each once."""
        return list(dict.fromkeys(product(self.runtimes, self.dtypes, self.batch_sizes)))

    def apart(self) -> list[Grid]:
        """Grids of one measurement in one mode each, which together measure the same."""
        return [
            replace(self, runtimes=(runtime,), dtypes=(dtype,), batch_sizes=(size,), modes=(mode,))
            for runtime, dtype, size in self.cells()
            for mode in dict.fromkeys(self.modes)
        ]


@dataclass(frozen=True)
class Work:
    """What a process needs to measure: functions of modules and data, as it may be another process.

    Args:
        models: makes the detectors by name, the base first, as they ship.
        runtimes: makes all runtimes by name.
        images: see :func:`jdkd.latency.measure`.
        device: where to measure.
        score: the mAP of a detector that was timed; None where it is not asked for.
    """

    models: Callable[[], Mapping[str, nn.Module]]
    runtimes: Callable[[], Mapping[str, Runtime]]
    images: Sequence[Tensor]
    device: str
    score: Score | None = None


def measure_grid(work: Work, grid: Grid, progress: MeasuringCallback | None = None) -> list[LatencyReport]:
    """Measures models against each other in every cell of a grid; the base of a ratio runs in the same runtime.

    Args:
        work: what to measure.
        grid: how.
        progress: called with (measurements done, measurements, {}), in a single process with rounds.

    Returns:
        A report for every cell, of all processes together.

    Raises:
        InputError: a runtime cannot run here or cannot run one of the models, or a process died.
    """
    require_runnable(grid.runtimes, work.runtimes(), torch.device(work.device), grid.dtypes)
    if grid.processes == 1:
        return measured_here(work, grid, progress)
    found = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        for number in range(grid.processes):
            part = work if number == 0 else replace(work, score=None)
            try:
                found.append(fresh.submit(_measured_there, part, grid, torch.get_num_threads()).result())
            except BrokenProcessPool as error:
                raise InputError(
                    f"process {number + 1} of {grid.processes} died while it measured, perhaps for want of memory; "
                    "measure smaller batches."
                ) from error
            if progress:
                progress(number + 1, grid.processes, {})
    return [pooled(reports) for reports in zip(*found, strict=True)]


def measured_here(work: Work, grid: Grid, progress: MeasuringCallback | None = None) -> list[LatencyReport]:
    """One report for every cell, measured in this process; arguments as of :func:`measure_grid`."""
    models, runtimes, reports = work.models(), work.runtimes(), []
    scores: dict[tuple[str, str], dict[str, float]] = {}
    cells, schedule = grid.cells(), vars(grid.schedule)
    for number, (runtime, dtype, batch_size) in enumerate(cells):

        def told(done: int, total: int, values: dict[str, float], number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(cells) * total, values)

        report = measure(
            models,
            work.images,
            device=work.device,
            batch_size=batch_size,
            modes=grid.modes,
            runtime=runtimes[runtime],
            dtype=dtype,
            score=None if (runtime, dtype) in scores else work.score,
            progress=told,
            **schedule,
        )
        known = {name: model.facts["map"] for name, model in report.models.items() if "map" in model.facts}
        known = scores.setdefault((runtime, dtype), known)
        reports.append(with_facts(report, {name: {"map": value} for name, value in known.items()}))
    return reports


def with_facts(report: LatencyReport, facts: Mapping[str, Mapping[str, object]]) -> LatencyReport:
    """A report that says more of its models.

    Args:
        report: as it was measured.
        facts: by the name of the model.
    """
    models = {
        name: replace(model, facts={**model.facts, **facts.get(name, {})}) for name, model in report.models.items()
    }
    return replace(report, models=models)


def _measured_there(work: Work, grid: Grid, threads: int) -> list[LatencyReport]:
    torch.set_num_threads(threads)
    return measured_here(work, grid)
