"""See :class:`Progress`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

QUIET_SECONDS = 15.0
MIRROR_SECONDS = 30.0  # between two looks of TensorBoard's or Optuna's mirror at a run
SHOWN = 6


class Progress:
    """Shows how far a command is: bars on a terminal, now and then a line where the output goes elsewhere.

    Everything goes to stderr. Use it as a context manager, and hand `task(name)` or the object itself to
    whatever reports its progress.
    """

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bars: Any = None
        self._shown: Any = None  # on the terminal, from beginning to end
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, tuple[float, int]] = {}
        self._lines_from: dict[str, tuple[float, int]] = {}
        if self._console.is_terminal:
            self._bars = self._shown = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[values]}", markup=False, style="cyan"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(compact=True),
                console=self._console,
            )

    def task(self, name: str) -> Callable[..., None]:
        """A callback `(done, total, values={})` that reports under a name."""
        return partial(self, name)

    def training(self, name: str, images: int) -> Callable[..., None]:
        """A callback of :func:`jdkd.train.fit` that shows the images per second beside the losses.

        Args:
            name: what is trained.
            images: of a step.
        """
        first: tuple[int, float] | None = None  # step and time of the first report; what was before it was slower

        def report(step: int, total: int, losses: Mapping[str, float]) -> None:
            nonlocal first
            now = time.monotonic()
            first = first or (step, now)
            taken, spent = step - first[0], now - first[1]
            rate = {"images/s": images * taken / spent} if taken and spent > 0 else {}
            self(name, step, total, {**losses, **rate})

        return report

    def __call__(self, name: str, done: int, total: int, values: Mapping[str, Any] | None = None) -> None:
        """Report that `done` of `total` parts of `name` are done.

        Args:
            name: what is going on.
            done, total: counts.
            values: figures to show beside it, by name.
        """
        shown = " ".join(f"{key} {_figure(value)}" for key, value in (values or {}).items())
        if self._bars is None:
            self._line(name, done, total, shown)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, values="")
            self._hide_finished()
        elif done < next(task.completed for task in self._bars.tasks if task.id == self._tasks[name]):
            self._bars.reset(self._tasks[name], visible=True)  # another of the same name begins
        self._bars.update(self._tasks[name], completed=done, total=total, values=shown)

    def __enter__(self) -> Self:
        if self._shown is not None:
            self._shown.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown.stop()

    def _line(self, name: str, done: int, total: int, values: str) -> None:
        now = time.monotonic()
        last, told = self._told.get(name, (now, -1))
        if name not in self._told or done < told:  # another of the same name begins
            last, told = now, -1
            self._told[name] = (now, -1)
            self._lines_from[name] = (now, done)
        if told != done and (done >= total or now - last >= QUIET_SECONDS):
            self._told[name] = (now, done)
            begun, at = self._lines_from[name]
            left = ""
            if at < done < total and now > begun:
                left = f"  about {clock((now - begun) * (total - done) / (done - at))} left"
            line = f"{name}  {done}/{total}  {values}".rstrip() + left
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _hide_finished(self) -> None:
        """Keep the last few bars only, so that they fit the screen."""
        finished = [task for task in self._bars.tasks if task.finished and task.visible]
        for task in finished[: max(0, len(self._bars.tasks) - SHOWN)]:
            self._bars.update(task.id, visible=False)


def clock(seconds: float) -> str:
    """A time in words: seconds, minutes or hours."""
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
