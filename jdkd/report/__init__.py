"""What came out of a search, or comes out of it so far: a plot, a page and a table."""

from __future__ import annotations

from pathlib import Path

from jdkd.files import write_whole
from jdkd.report.mirrors import Mirrors
from jdkd.report.outcome import Outcome, read_outcome
from jdkd.report.plot import pareto_plot
from jdkd.report.search_page import page
from jdkd.report.table import result_table
from jdkd.report.verdict import summary, verdict

__all__ = ["Mirrors", "Outcome", "read_outcome", "result_table", "summary", "verdict", "write_report"]


def write_report(folder: Path | str) -> tuple[Path, Path]:
    """Write the plot and the page of a search, finished or under way, beside its archive.

    Args:
        folder: with `archive.sqlite`, and `result.json` once the search is finished.

    Returns:
        Paths of `pareto.png` and `report.html`.

    Raises:
        InputError: there is no archive, or a file is unreadable; nothing is written then.
    """
    folder = Path(folder)
    outcome = read_outcome(folder)
    plot, text = pareto_plot(outcome), page(outcome)
    write_whole(folder / "pareto.png", plot, shared=True)  # a search writes them, and `jdkd report` while it runs
    write_whole(folder / "report.html", text, shared=True)
    return folder / "pareto.png", folder / "report.html"
