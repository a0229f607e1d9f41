"""See :func:`result_table`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jdkd.report.latencies import aa_verdict
from jdkd.report.scores import rows
from jdkd.report.verdict import verdict

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("", "mAP", "mAP50", "p50, ms", "ratio (95 %)", "params", "GMACs", "steps")


def result_table(result: dict[str, Any]) -> Table:
    """The outcome of a search as a table that fits 80 columns.

    Args:
        result: contents of `result.json`.

    Returns:
        A rich table: a row each for base, control and students; below it, whether they are what was asked for, and
        whether the clock told the base from itself.
    """
    from rich import box
    from rich.table import Table

    images = [(result.get(role) or {}).get("images", "?") for role in ("report", "selection")]
    title = "Scores on {} images, chosen on {} others".format(*images)
    trusted, doubt = aa_verdict(result) or (True, "")
    caption = f"{verdict(result)} {'' if trusted else doubt}".strip() or None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, caption=caption)
    table.collapse_padding = True
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows(result):
        _, score, score50, milliseconds, ratio, params, gmacs, steps = row.cells()
        p50 = milliseconds.partition(" ")[0]
        name = row.title.replace(" for", "") if row.key == "student" else row.key
        table.add_row(
            *(name, score, score50, p50, ratio, f"{params}{' M' * (row.params is not None)}", gmacs, steps),
            style="bold" if row.key == "student" else None,
        )
    return table
