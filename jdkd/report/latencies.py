"""See :func:`latency_section`."""

from __future__ import annotations

from html import escape
from typing import Any

from jdkd.report.outcome import Outcome
from jdkd.report.svg import ABOVE, BELOW, Axes, spread, tag

ROW = 34  # pixels of an interval's row


def aa_verdict(result: dict[str, Any]) -> tuple[bool, str] | None:
    """Whether the base timed against itself is as fast as itself, and that as a sentence; None where it was not timed.

    Args:
        result: contents of `result.json`.
    """
    aa = result.get("aa")
    if not isinstance(aa, dict) or not aa.get("interval"):
        return None
    low, high = aa["interval"]
    range_ = f"{aa['ratio']:.3f} of its own time (95 %: {low:.3f}–{high:.3f})"
    if low <= 1 <= high:
        return True, f"Timed against itself, the base takes {range_}, which contains 1, as it must."
    return False, (
        f"The clock of this search cannot be trusted: timed against itself, the base takes {range_}, which does not "
        "contain 1. No ratio of it is better than that; time again on a machine that does nothing else."
    )


def latency_section(outcome: Outcome) -> str:
    """Measured ratios with their intervals, the base against itself first; and predicted against measured ones.

    Args:
        outcome: of a search.

    Returns:
        HTML; empty where a result has none of it.
    """
    return _intervals(outcome) + _predictions(outcome)


def _intervals(outcome: Outcome) -> str:
    rows: list[tuple[str, float, float, float, float, bool]] = []  # name, ratio, low, high, asked, as it must be
    aa = aa_verdict(outcome.result)
    if aa is not None:
        own = outcome.result["aa"]
        rows.append(("base against itself", own["ratio"], *own["interval"], 1.0, aa[0]))
    for student in outcome.students:
        ratio, interval = (student.entry[name] for name in ("latency_ratio", "latency_ratio_interval"))
        rows.append((student.title, ratio, *interval, student.target, ratio <= student.target))
    if not rows:
        return ""
    values = [value for row in rows for value in row[1:5]]
    labels, size = ("latency over the base's, 95 % intervals", None), (760, ABOVE + ROW * len(rows) + BELOW)
    axes = Axes(spread([*values, 1.0], 0.12), (len(rows), 0), labels, size, left=170)
    drawn = []
    for number, (name, ratio, low, high, asked, holds) in enumerate(rows):
        y, kind = axes.y(number + 0.5), "good" if holds else "bad"
        drawn.append(tag("text", name, x=axes.left - 12, y=y + 4, text_anchor="end"))
        at = axes.x(asked)
        drawn.append(tag("line", x1=at, x2=at, y1=y - ROW / 2 + 3, y2=y + ROW / 2 - 3, class_="target"))
        drawn.append(tag("line", x1=axes.x(low), x2=axes.x(high), y1=y, y2=y, class_=f"interval {kind}"))
        told = tag("title", f"{name}: {ratio:.4f} ({low:.4f}–{high:.4f})")
        drawn.append(tag("circle", None, told, cx=axes.x(ratio), cy=y, r=5, class_=f"middle {kind}"))
    title = "latency ratios of the students and of the base against itself, with 95 % intervals"
    chart = axes.drawing("".join(drawn), title, class_="chart wide", id="intervals")
    told = f'<p class="{"" if aa[0] else "bad"}" id="aa">{escape(aa[1])}</p>' if aa else ""
    legend = f'<p class="legend">┊ what was asked for, and 1 for the base.</p>{_fixed(outcome)}'
    return f'{told}<div class="scroll">{chart}</div>{legend}'


def _fixed(outcome: Outcome) -> str:
    """What of the base's latency no cut saves, and what students have left of the rest; empty where it is unknown."""
    fixed = outcome.result.get("fixed_share")
    if fixed is None or fixed >= 1:
        return ""
    left = [(one.title, max(0.0, one.entry["latency_ratio"] - fixed) / (1 - fixed)) for one in outcome.students]
    has = ", ".join(f"the {title} has {share:.0%} of the rest" for title, share in left)
    text = f"By the table of its parts, {fixed:.2f} of the base's latency is none that a cut saves; {has}."
    return f'<p id="fixed">{escape(text)}</p>'


def _predictions(outcome: Outcome) -> str:
    """How well the table of latencies foresaw what was then measured, architecture by architecture."""
    pairs = {one.architecture_id: one for one in outcome.scored if one.kind == "morph"}
    if len(pairs) < 2:
        return ""
    told, text = outcome.result.get("predictor"), "Predicted from a table of parts, before it was measured"
    if told:
        text += (
            f": over {told['architectures']} architectures the rank correlation (Kendall's tau) is "
            f"{told['kendall_tau']:.2f}, the mean absolute error {told['mean_absolute_percentage_error']:.1f} %"
        )
    range_ = spread([value for one in pairs.values() for value in (one.predicted, one.latency_ratio)])
    axes = Axes(range_, range_, ("predicted latency over the base's", "measured"), (460, 380))
    line = tag("line", x1=axes.x(range_[0]), x2=axes.x(range_[1]), y1=axes.y(range_[0]), y2=axes.y(range_[1]))
    drawn = [f'<g class="diagonal">{line}</g>']
    for one in pairs.values():
        words = tag("title", f"{one.number}: predicted {one.predicted:.3f}, measured {one.latency_ratio:.3f}")
        place = {"cx": axes.x(one.predicted), "cy": axes.y(one.latency_ratio)}
        drawn.append(tag("circle", None, words, **place, r=4, class_="pupil"))
    chart = axes.drawing("".join(drawn), "predicted against measured latency", class_="chart half")
    return f'<p id="predictor">{escape(text)}.</p><div class="scroll">{chart}</div>'
