"""What came out of a search: a plot, a page and a table."""

from __future__ import annotations

from pathlib import Path

from jdkd.files import write_whole
from jdkd.report.html import page
from jdkd.report.outcome import Outcome, read_outcome, verdict
from jdkd.report.plot import pareto_plot
from jdkd.report.table import result_table

__all__ = ["Outcome", "read_outcome", "result_table", "verdict", "write_report"]


def write_report(folder: Path | str) -> tuple[Path, Path]:
    """Write the plot and the page of a finished search beside its archive.

    Args:
        folder: with `result.json` and `archive.sqlite`.

    Returns:
        Paths of `pareto.png` and `report.html`.

    Raises:
        InputError: one of the two is missing or unreadable; nothing is written then.
    """
    folder = Path(folder)
    outcome = read_outcome(folder)
    plot = pareto_plot(outcome)
    text = page(outcome, plot)
    write_whole(folder / "pareto.png", plot)
    write_whole(folder / "report.html", text)
    return folder / "pareto.png", folder / "report.html"
