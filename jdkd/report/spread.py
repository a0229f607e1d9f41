"""See :func:`spread_plot` and :func:`spread_table`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jdkd.report.plot import BLUE, GREY, ORANGE, VERMILLION, xy
from jdkd.search.choice import pareto_front

if TYPE_CHECKING:
    from rich.table import Table

    from jdkd.pool.spread import SpreadRow


def spread_plot(rows: Sequence[SpreadRow], title: str) -> bytes:
    """Plot mAP over latency of the teachers of a pool.

    Args:
        rows: of :class:`jdkd.pool.Spread`.
        title: above the plot.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), dpi=130, layout="constrained")  # no pyplot: no display, no state
    axes = figure.subplots()
    subnets = [row for row in rows if not row.is_foreign]
    foreign = [row for row in rows if row.is_foreign]
    best = pareto_front(rows)
    axes.step(*xy(best), where="post", color=GREY, linewidth=1.4, zorder=1, label="none is faster and better")
    for points, label, look in (
        (subnets, "subnet", {"color": BLUE, "fmt": "o"}),
        (foreign, "foreign teacher", {"color": ORANGE, "fmt": "^"}),
        ([row for row in subnets if row.latency_ratio == 1], "largest", {"color": VERMILLION, "fmt": "s"}),
    ):
        if points:
            wide = [[abs(row.latency_ratio - row.latency_interval[side]) for row in points] for side in (0, 1)]
            axes.errorbar(*xy(points), xerr=wide, markersize=6, capsize=2, elinewidth=0.8, label=label, **look)
    for row in foreign:
        axes.annotate(row.name, (row.latency_ratio, row.map), textcoords="offset points", xytext=(6, 4), fontsize=9)
    axes.set(xlabel="latency, end to end, relative to the largest network", ylabel="mAP (COCO, IoU 0.50:0.95)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.margins(0.08, 0.12)
    axes.legend(loc="best", fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def spread_table(rows: Sequence[SpreadRow]) -> Table:
    """The same as a table, best first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title="Teachers of the pool")
    table.add_column("teacher", overflow="fold")
    for heading in ("mAP", "M params", "p50, ms", "to the largest (95 %)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row.latency_interval
        ratio = "1" if row.latency_ratio == low == high == 1 else f"{row.latency_ratio:.3f} ({low:.3f}–{high:.3f})"
        name = f"{row.name} (foreign)" if row.is_foreign else row.name
        table.add_row(name, f"{row.map:.3f}", f"{row.parameters / 1e6:.2f}", f"{row.latency_ms:.1f}", ratio)
    return table
