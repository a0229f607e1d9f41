"""`jdkd tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jdkd.errors import InputError


@dataclass(frozen=True)
class Tune:
    """Time every way to compute a loss or a convolution here, and take the fastest from now on.

    Every kernel is checked against float64 first. A region of sizes takes another way than the default only where that
    was faster beyond doubt. What was timed before is kept, so a run that ends early is carried on by the next.

    Example: jdkd tune --minutes 3
    """

    minutes: float = 3.0
    """Time for all devices together."""
    quick: bool = False
    """Only what pools and searches run: no lists of channels, and the dtype that is trained in most, float32 on a CPU
    and bfloat16 on a GPU."""
    again: bool = False
    """Time what was timed before, too."""

    def __call__(self) -> None:
        from rich.console import Console

        from jdkd.cli.progress import Progress
        from jdkd.env import ACCELERATE, devices, load_operators
        from jdkd.tune import tune

        load_operators()
        kept: dict[str, str] = {}
        with Progress() as progress:

            def told(device: str, done: int, total: int, values: Any) -> None:
                kept[device] = f"{done} of {total} regions of {device}"
                progress(device, done, total, values)

            options = {"minutes": self.minutes, "quick": self.quick, "again": self.again, "progress": told}
            try:
                outcomes = tune(devices()[::-1], **options)
            except KeyboardInterrupt:
                what = " and ".join(kept.values()) or "nothing new"
                raise InputError(f"interrupted; {what} kept: carry on with jdkd tune") from None
        console = Console()
        for outcome in outcomes:
            _show(console, outcome)
        console.print(f"accelerate: {ACCELERATE}", soft_wrap=True)


def _show(console: Any, outcome: Any) -> None:
    """Prints the regions of a device that take another way than the default, how many there are, and what was not timed
    as there is one way alone."""
    from rich.table import Table

    if rows := outcome.changed():
        table = Table("table", "region", "takes", "instead of", "times as fast", title=str(outcome.device))
        for name, region, found in rows:
            low, high = found.gain()
            table.add_row(name, region, found.path, found.default, f"{low:.2f} to {high:.2f}")
        console.print(table)
    known = sum(map(len, outcome.regions.values()))
    left = f", {outcome.left} are left: run it again" if outcome.left else ""
    console.print(
        f"{outcome.device}: {known} regions timed, {outcome.timed} of them now{left}; {len(rows)} take another way "
        f"than the default; {outcome.file}",
        soft_wrap=True,
    )
    if outcome.alone:
        console.print(f"{outcome.device}: not timed, as nothing else can run there:")
        console.print(*(f"  {each}" for each in outcome.alone), sep="\n", soft_wrap=True)
