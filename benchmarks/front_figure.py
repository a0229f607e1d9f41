"""The picture of the front page: what searches from deep bases left of latency, and what it did to mAP.

Everything is read off the rows of :mod:`benchmarks.proof`; `python -m benchmarks.readme` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jdkd.report.svg import Axes, drawing, spread, tag

Row = dict[str, Any]
SHOWN = {  # searches whose points are drawn: the colour of their students, and what is said of them
    "blood_cells_deep": ("#D55E00", "students, each seed its own search"),
    "blood_cells_deep_front": ("#0072B2", "students of one search for three latencies at once"),
}
GREY = "#6E6E6E"  # colours of Okabe and Ito, Color Universal Design (2008); seen on white and on black
PUBLISHED = 0.53  # of the base's latency, by Joint-DetNAS
SIZE, KEY = (760, 360), 24  # in pixels; the line of a key
STYLE = f"text{{font:13px sans-serif;fill:{GREY}}}.grid{{stroke:{GREY};stroke-opacity:.25}}"
LABELS = "latency end to end, over the base's", "mAP on photographs that chose nothing"


def figure(results: dict[str, Sequence[Row]]) -> str:
    """An SVG of mAP over latency, with the base and the control of every seed; empty without a search.

    Args:
        results: of :data:`SHOWN`, by name; of a seed that occurs twice, the later one counts, as in the tables.
    """
    results = {name: [*{row["seed"]: row for row in results[name]}.values()] for name in SHOWN if results.get(name)}
    if not results:
        return ""
    students = [student for rows in results.values() for row in rows for student in row["students"]]
    bases = [row[name] for name in ("base", "control") for row in next(iter(results.values())) if "map" in row[name]]
    across = spread([1.0, *(ratio for one in students for ratio in one["latency_ratio_interval"])])
    axes = Axes(across, spread(one["map"] for one in [*students, *bases]), LABELS, SIZE)
    place = {"x1": axes.x(PUBLISHED), "x2": axes.x(PUBLISHED), "y1": axes.top, "y2": axes.bottom}
    drawn = [tag("line", **place, stroke=GREY, stroke_width=1.6, stroke_dasharray="4 4")]
    said = [("○", GREY, "base"), ("□", GREY, "base trained on as long as the student (control)")]
    for row in next(iter(results.values())):
        drawn += [_circle(axes, row["base"], GREY, fill="none"), _square(axes, row["control"])]
    for name, rows in results.items():
        colour, what = SHOWN[name]
        said.append(("●", colour, what))
        for row in rows:
            front = sorted(row["students"], key=lambda one: one["latency_ratio"])
            drawn.append(_line(axes, [(one["latency_ratio"], one["map"]) for one in front], colour))
            for one in front:
                drawn.append(_line(axes, [(end, one["map"]) for end in one["latency_ratio_interval"]], colour))
                drawn.append(_circle(axes, one, colour, fill=colour))
    said.append(("┆", GREY, f"{PUBLISHED:g}, the published saving"))
    key = [
        tag("text", f"{sign} {words}", x=axes.left, y=SIZE[1] + KEY * number, style=f"fill:{colour}")
        for number, (sign, colour, words) in enumerate(said, 1)
    ]
    inside = tag("style", STYLE) + axes.frame() + "".join(drawn + key)
    size = SIZE[0], SIZE[1] + KEY * len(said) + 10
    return drawing(size, inside, f"{LABELS[1]} over {LABELS[0]}", xmlns="http://www.w3.org/2000/svg") + "\n"


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> str:
    return tag("path", None, d=axes.path(points), fill="none", stroke=colour, stroke_width=1.6)


def _circle(axes: Axes, one: Row, colour: str, fill: str) -> str:
    at = {"cx": axes.x(one["latency_ratio"]), "cy": axes.y(one["map"])}
    return tag("circle", None, **at, r=5, fill=fill, stroke=colour, stroke_width=1.6)


def _square(axes: Axes, one: Row) -> str:
    if "map" not in one:  # a control that failed
        return ""
    x, y = axes.x(one["latency_ratio"]), axes.y(one["map"])
    return tag("rect", None, x=x - 5, y=y - 5, width=10, height=10, fill="none", stroke=GREY, stroke_width=1.6)
