"""See :func:`teachers_section`."""

from __future__ import annotations

import math
from collections import defaultdict
from html import escape
from typing import Any

from jdkd.pool.members import BASE, teacher_from_json
from jdkd.report.front import mark
from jdkd.report.outcome import Outcome, gains, signed
from jdkd.report.svg import Axes, spread, tag
from jdkd.search.archive import Candidate

SILENT = 8  # members that taught nobody and are listed all the same, best first


def teachers_section(outcome: Outcome) -> str:
    """Who could teach, who taught whom, and whether teachers stayed ahead of their students.

    Args:
        outcome: of a search, finished or under way.

    Returns:
        HTML; empty where there was no teacher.
    """
    scores = {str(teacher_from_json(member)): member for member in outcome.teachers}
    taught: dict[str, list[Candidate]] = defaultdict(list)
    for one in outcome.candidates:
        if one.teacher is not None:
            taught[str(one.teacher)].append(one)
    if not scores and not taught:
        return ""
    if BASE in taught:
        base = outcome.candidates[0]
        scores[BASE] = {"map": base.map, "parameters": base.params}
    names = sorted({*scores, *taught}, key=lambda name: -_number(scores.get(name), "map"))
    silent = [name for name in names if name not in taught]
    shown = [name for name in names if name in taught or name in silent[:SILENT]]
    body = "".join(_row(name, scores.get(name), taught.get(name, []), outcome) for name in shown)
    left_out = len(names) - len(shown)
    more = f'<p class="faint">{left_out} more members were scored and taught nobody.</p>' if left_out else ""
    head = (
        '<th class="text">teacher</th><th>mAP</th><th>M params</th><th>taught</th>'
        '<th>mean gain</th><th class="text">candidates</th>'
    )
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return _curriculum(outcome, scores) + table + more


def _row(name: str, member: dict[str, Any] | None, students: list[Candidate], outcome: Outcome) -> str:
    changes = [gains(one, outcome.by_id.get(one.parent))[0] for one in students]
    known = [change for change in changes if math.isfinite(change)]
    mean = signed(sum(known) / len(known)) if known else "–"
    size = (member or {}).get("parameters")
    cells = [_shown(member, "map"), "–" if size is None else f"{size / 1e6:.2f}"]
    whom = ", ".join(str(one.number) for one in students) or "–"
    inner = "".join(f"<td>{cell}</td>" for cell in (*cells, len(students), mean))
    return f'<tr><td class="text">{escape(name)}</td>{inner}<td class="text wrap">{whom}</td></tr>'


def _curriculum(outcome: Outcome, scores: dict[str, dict[str, Any]]) -> str:
    """Every candidate's mAP in the order of the search, and above or below it that of who taught it."""
    pairs = [(one, _number(scores.get(str(one.teacher)), "map")) for one in outcome.scored]
    pairs = [(one, score) for one, score in pairs if one.teacher is not None and math.isfinite(score)]
    if not pairs:
        return ""
    values = [value for one, score in pairs for value in (one.map, score)]
    last = max(one.number for one, _ in pairs)
    labels = ("candidate, in the order of the search", "mAP on the images that select")
    axes = Axes((0.5, last + 0.5), spread(values), labels, (760, 260))
    drawn = []
    for one, score in pairs:
        x, own, other = axes.x(one.number), axes.y(one.map), axes.y(score)
        ahead = score > one.map
        told = f"{one.number} ({one.map:.3f}) was taught by {one.teacher} ({score:.3f})"
        drawn.append(tag("line", x1=x, x2=x, y1=own, y2=other, class_="ahead" if ahead else "behind"))
        drawn.append(mark("teacher", x, other, 4.5, "teacher", told))
        drawn.append(mark("morph", x, own, 3.5, "pupil", told))
    behind = sum(score <= one.map for one, score in pairs)
    title = "mAP of every candidate and of its teacher, in the order of the search"
    note = f"{behind} of {len(pairs)} candidates ended at or above their teacher" if behind else "No one caught up"
    caption = f'<p class="legend">▲ teacher, ● candidate that it taught. {note}.</p>'
    return f'<div class="scroll">{axes.drawing("".join(drawn), title, class_="chart wide")}</div>{caption}'


def _number(member: dict[str, Any] | None, name: str) -> float:
    value = (member or {}).get(name)
    return math.nan if value is None else float(value)


def _shown(member: dict[str, Any] | None, name: str) -> str:
    value = _number(member, name)
    return "–" if math.isnan(value) else f"{value:.3f}"
