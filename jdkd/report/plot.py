"""See :func:`pareto_plot`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jdkd.report.outcome import KINDS, Outcome
from jdkd.report.scores import Row, rows
from jdkd.search.choice import Placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, Color Universal Design (2008): told apart with any kind of colour vision; shapes differ too.
BLUE, ORANGE, GREEN, VERMILLION, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#6E6E6E",
)
LOOKS = {
    "morph": {"color": BLUE, "marker": "o"},
    "teacher": {"color": ORANGE, "marker": "^"},
    "train": {"color": GREEN, "marker": "d"},
}
FINAL = {
    "base": {"color": "black", "marker": "s", "markersize": 9},
    "control": {"color": GREEN, "marker": "D", "markersize": 8},
    "student": {"color": VERMILLION, "marker": "*", "markersize": 16},
}


def pareto_plot(outcome: Outcome) -> bytes:
    """Plot mAP against latency: the search on the images that select, beside it what came out on those that report.

    They score differently, so they have panels of their own. Latency is relative to the base, timed
    in turn with it, which holds up where a machine's speed drifts during a search; the upper axis gives ms
    at the speed of the result. Candidates that failed are left out.

    Args:
        outcome: of a search; while it has no result, the second panel is left out.

    Returns:
        A PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "font.size": 11,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.fonttype": "none",
    }
    measured = rows(outcome.result)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12.5, 5.6), dpi=130, layout="constrained")  # no pyplot: no display, no state
        panels = figure.subplots(1, 2 if measured else 1, width_ratios=(3, 2) if measured else None, squeeze=False)[0]
        _plot_search(panels[0], outcome)
        if measured:
            _plot_final(panels[1], measured)
            panels[1].set_title(f"Result: {_counted(outcome, 'report')}, 95 % intervals")
        base_ms = ((outcome.result.get("base") or {}).get("latency_ms") or {}).get("p50")
        for axes in panels:
            _dress(axes, base_ms, outcome.targets)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _plot_search(axes: Axes, outcome: Outcome) -> None:
    """Every candidate, the front and the lineages of the students."""
    candidates, lines = outcome.scored, outcome.lines
    for kind, label in KINDS.items():
        points = [candidate for candidate in candidates if candidate.kind == kind]
        if points:
            axes.scatter(*xy(points), s=46, alpha=0.75, edgecolors="white", linewidths=0.6, label=label, **LOOKS[kind])
    if outcome.front:
        axes.step(*xy(outcome.front), where="post", color=GREY, linewidth=1.4, zorder=1, label="Pareto front")
    for number, line in enumerate(lines):
        label = None if number else "lineage of a student" if len(lines) > 1 else "lineage of the student"
        axes.plot(*xy(line), color=VERMILLION, linewidth=1.4, linestyle=":", zorder=1, label=label)
    ends = [line[-1] for line in lines]
    for name, points in (("base", [one for one in candidates if one.kind == "base"]), ("student", ends)):
        if points:
            axes.plot(*xy(points), linestyle="none", markeredgecolor="white", label=name, zorder=4, **FINAL[name])
    axes.set_title(f"Search: the base and {len(outcome.candidates) - 1} candidates, {_counted(outcome, 'selection')}")
    axes.set_ylabel("mAP (COCO, IoU 0.50:0.95)")


def _plot_final(axes: Axes, measured: Sequence[Row]) -> None:
    """Base, control and students with the intervals of their latency ratios."""
    for row in measured:
        if row.map is None or row.ratio is None:
            continue
        low, high = row.interval or (row.ratio, row.ratio)
        error = [[max(0.0, row.ratio - low)], [max(0.0, high - row.ratio)]]
        look = {"capsize": 3, "elinewidth": 1.2, "markeredgecolor": "white", "linestyle": "none", "zorder": 3}
        axes.errorbar(
            [row.ratio], [row.map], xerr=error, label=f"{row.title} ({row.map:.3f})", **look, **FINAL[row.key]
        )


def _dress(axes: Axes, base_ms: float | None, targets: Sequence[float]) -> None:
    """Labels, limits, legend, the asked latencies, and a second axis in ms."""
    axes.set_xlabel("latency, end to end, relative to the base")
    axes.margins(x=0.08, y=0.12)
    asked = f"asked: {', '.join(map(str, targets))}"
    for number, target in enumerate(targets):
        axes.axvline(target, color=GREY, linewidth=1, linestyle="--", label=None if number else asked, zorder=0)
    if base_ms:
        upper = axes.secondary_xaxis("top", functions=(lambda x: x * base_ms, lambda x: x / base_ms))
        upper.set_xlabel(f"p50, ms, where the base takes {base_ms:.1f}", fontsize=9, color=GREY)
        upper.tick_params(labelsize=9, colors=GREY)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=9, framealpha=0.9)


def _counted(outcome: Outcome, role: str) -> str:
    part = outcome.result.get(role)
    named = {"selection": "selecting", "report": "reporting"}[role]
    return f"{part['images']:,} {named} images" if isinstance(part, dict) else f"{named} images"


def xy(points: Sequence[Placed]) -> tuple[list[float], list[float]]:
    """Latency ratios and mAPs."""
    return [one.latency_ratio for one in points], [one.map for one in points]
