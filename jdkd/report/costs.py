"""See :func:`cost_section`."""

from __future__ import annotations

from html import escape
from typing import Any

from jdkd.report.svg import drawing, tag

KINDS = ("pool", "candidates", "control", "timing", "scoring", "proposing")  # what a search spends time on
OWN_KINDS = ("training", "scoring", "timing", "inheriting")  # and a candidate
PLACES = (("pool_steps", "teacher pool"), ("candidate_steps", "candidates"), ("control_steps", "control"))


def cost_section(result: dict[str, Any]) -> str:
    """Where time and training steps went, as bars.

    Args:
        result: contents of `result.json`.

    Returns:
        HTML; empty where the result does not say.
    """
    cost = result.get("cost")
    if not isinstance(cost, dict):
        return ""
    steps = [(title, cost[name], f"{cost[name]:,}") for name, title in PLACES if cost.get(name)]
    parts = []
    for title, name, kinds in (
        ("Time of the search", "seconds", KINDS),
        ("Time of base and candidates, wherever they were made", "candidate_seconds", OWN_KINDS),
    ):
        seconds = cost.get(name) or {}
        named = [*kinds, *(kind for kind in seconds if kind not in kinds)]
        if times := [(kind, seconds[kind], _clock(seconds[kind])) for kind in named if seconds.get(kind)]:
            parts.append(_bar(f"{title}, {_clock(sum(seconds.values()))} in all", times))
    if steps:
        parts.append(_bar(f"Training steps, {sum(each[1] for each in steps):,} in all", steps))
    return "".join(parts)


def _bar(title: str, parts: list[tuple[str, float, str]]) -> str:
    """One bar divided into parts of (name, amount, amount in words), and a legend with their shares."""
    total, at, drawn, keys = sum(amount for _, amount, _ in parts), 0.0, [], []
    for number, (name, amount, words) in enumerate(parts):
        width = 760 * amount / total
        told = tag("title", f"{name}: {words} ({amount / total:.1%})")
        drawn.append(tag("rect", None, told, x=at, y=0, width=width, height=26, class_=f"shade{number % 5}"))
        at += width
        share = f"{100 * amount / total:.1f} %"
        swatch = f'<i class="swatch shade{number % 5}"></i>'
        keys.append(f"<span>{swatch} {escape(name)} {words} ({share})</span>")
    chart = drawing((760, 26), "".join(drawn), title, class_="chart bar", preserveAspectRatio="none")
    return f'<h3>{escape(title)}</h3>{chart}<p class="legend">{"".join(keys)}</p>'


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
