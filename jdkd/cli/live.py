"""See :class:`SearchProgress`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.cli.progress import MIRROR_SECONDS, Progress, clock
from jdkd.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from jdkd.report import Outcome

BUDGET = "budget"  # name under which a search tells of the steps that it has taken
COUNTED = ("candidate ", "pool: ")  # how the names of trainings begin that the budget is spent on


class SearchProgress(Progress):
    """Shows a search: on a terminal a table that stays, with the best per target, the budget and what is trained now.

    Where the output goes elsewhere, it is lines as of :class:`Progress`. The table is made of what the search reports
    and of its archive, which is read whenever `budget` is reported: (steps taken, steps planned, {"generations": n}).

    Args:
        folder: of the search; it need not exist yet.
        targets: latencies that were asked for, over the base's.
        refresh: called now and then, and whenever candidates were archived; mirrors are.
    """

    def __init__(self, folder: Path, targets: Sequence[float], refresh: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.folder, self.targets, self._refresh = folder, targets, refresh
        self._outcome: Outcome | None = None
        self._steps, self._planned, self._generations = 0, 0, 0
        self._under_way: dict[str, int] = {}  # steps of trainings that no report of the budget counts yet
        self._begun, self._begun_at, self._refreshed = time.monotonic(), 0, time.monotonic()
        if self._bars is not None:
            from rich.live import Live

            self._shown = Live(get_renderable=self.view, console=self._console, refresh_per_second=4)

    def __call__(self, name: str, done: int, total: int, values: Mapping[str, Any] | None = None) -> None:
        now = time.monotonic()
        if name == BUDGET:
            self._count(done, total, values or {})
        else:
            if name.startswith(COUNTED) and name != "pool: scoring":
                self._under_way[name] = done
            super().__call__(name, done, total, values)
        if self._refresh and (name == BUDGET or now - self._refreshed >= MIRROR_SECONDS):
            self._refresh()
            self._refreshed = time.monotonic()

    def view(self) -> RenderableType:
        """What a terminal shows: the state of the search, its best, and a bar for each thing that goes on."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        if self._planned:
            parts.append(Text(self.state(), style="bold"))
        if self._outcome is not None:
            parts.append(self._best(self._outcome))
        return Group(*parts, self._bars)

    def state(self) -> str:
        """Generation, candidates, budget and the time that is left, in a line."""
        taken = min(self._planned, self._steps + sum(self._under_way.values()))
        told, is_over = [], False
        if self._outcome is not None:
            last, tried = self._outcome.candidates[-1].generation, len(self._outcome.candidates) - 1
            now = last + any(name.startswith(COUNTED[0]) for name in self._under_way)
            told.append(f"generation {now}{f' of {self._generations}' if self._generations else ''}")
            is_over = last == self._generations
            failed = len(self._outcome.candidates) - len(self._outcome.scored)
            told.append(f"{tried} candidates{f', {failed} failed' if failed else ''}")
        told.append(f"{taken:,} of {self._planned:,} steps")
        spent, share = time.monotonic() - self._begun, (taken - self._begun_at) / max(1, self._planned - self._begun_at)
        if is_over:
            told.append("the result is being made")
        elif share > 0.02:
            told.append(f"about {clock(spent * (1 - share) / share)} left")
        return " · ".join(told)

    def _count(self, taken: int, planned: int, values: Mapping[str, Any]) -> None:
        """What is archived counts from now on, and is looked up."""
        from jdkd.report import read_outcome

        if not self._planned:  # a resumed search has taken steps that say nothing of this machine's speed
            self._begun, self._begun_at = time.monotonic(), taken
        self._steps, self._planned = taken, planned
        self._generations = values.get("generations", self._generations)
        self._under_way = {}
        for task in self._bars.tasks if self._bars is not None else ():
            self._bars.update(task.id, visible=not task.finished)
        with suppress(InputError):  # nothing is archived yet
            self._outcome = read_outcome(self.folder)
        if self._bars is None:
            self._console.print(self.state(), markup=False, highlight=False, soft_wrap=True)

    def _best(self, outcome: Outcome) -> Table:
        """The base, and per target the best candidate so far, or that there is none."""
        from rich import box
        from rich.table import Table

        from jdkd.search.choice import best_within

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in ("asked", "mAP", "ratio (95 %)", "#"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("what was done last", overflow="ellipsis", no_wrap=True)
        base = outcome.candidates[0]
        table.add_row("base", f"{base.map:.3f}", "1", "0", "", style="dim")
        for target in self.targets:
            best = best_within(outcome.scored[1:], target)
            if best is None:
                table.add_row(f"{target:g}", "–", "none so far", "", "")
                continue
            low, high = best.latency_interval
            ratio = f"{best.latency_ratio:.3f} ({low:.2f}–{high:.2f})"
            table.add_row(f"{target:g}", f"{best.map:.3f}", ratio, str(best.number), best.action)
        return table
