"""See :func:`page`."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from jdkd.report.archive import Candidate, front, lineage
from jdkd.report.outcome import HEADINGS, rows, verdict

_COLUMNS = (
    *("#", "action", "teacher", "mAP", "mAP50", "ratio", "p50, ms", "M params", "GMACs"),
    *("steps", "lineage", "seconds", "id", "parent"),
)
_TEXT = {"network", "action", "teacher", "id", "parent", "what", "value"}


def page(candidates: Sequence[Candidate], result: dict[str, Any], plot: bytes) -> str:
    """A page that tells a search by itself: no scripts, no links, the plot inlined.

    Args:
        candidates: the archive.
        result: contents of `result.json`.
        plot: a PNG.

    Returns:
        HTML.
    """
    best, student = {one.id for one in front(candidates)}, result.get("student_id")
    measured = rows(result)
    command = result.get("command") or ""
    return Template(files("jdkd.report").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title="Joint search for a student detector",
        verdict=escape(verdict(result)),
        image=f"data:image/png;base64,{base64.b64encode(plot).decode()}",
        result=_table(HEADINGS, [(row.cells(), row.key == "student") for row in measured]),
        lineage=_lineage(lineage(candidates, student)),
        candidates=_table(_COLUMNS, [(_cells(one, one.id in best), one.id == student) for one in candidates]),
        command=escape(command if isinstance(command, str) else shlex.join(command)),
        facts=_table(("what", "value"), [([name, value], False) for name, value in _facts(result)]),
    )


def _table(headings: Sequence[str], body: Iterable[tuple[Sequence[str], bool]]) -> str:
    """An HTML table; rows come with whether they are marked."""
    kinds = [' class="text"' if heading in _TEXT else "" for heading in headings]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, headings, strict=True))
    lines = []
    for cells, marked in body:
        inner = "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, cells, strict=True))
        opening = '<tr class="marked">' if marked else "<tr>"
        lines.append(f"{opening}{inner}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cells(one: Candidate, on_front: bool) -> list[str]:
    """A candidate as text, in the order of `_COLUMNS`."""
    return [
        f"{one.number}{'*' if on_front else ''}",
        one.action,
        one.teacher or "–",
        f"{one.map:.3f}",
        f"{one.map50:.3f}",
        f"{one.latency_ratio:.3f}",
        f"{one.latency_p50:.1f}",
        f"{one.params / 1e6:.2f}",
        f"{one.gmacs:.2f}",
        f"{one.steps:,}",
        f"{one.lineage_steps:,}",
        f"{one.seconds:.0f}",
        one.id[:10],
        one.parent[:10] if one.parent else "–",
    ]


def _lineage(line: Sequence[Candidate]) -> str:
    """The steps from the base to the student as an ordered list."""
    if not line:
        return "<p>The student is the base.</p>"
    items = []
    for one in line:
        teacher = f", taught by {one.teacher}" if one.teacher else ""
        cycle = f"; {one.steps:,} steps" if one.steps else ""
        scores = f"mAP {one.map:.3f} at {one.latency_ratio:.3f} of the base's time"
        items.append(
            f"<li>{escape(one.action)}{escape(teacher)}{cycle}<br><span class='faint'>{scores}</span></li>"
        )
    cycles = ", ".join(f"{steps:g} steps at {rate:g}" for steps, rate in line[-1].cycles)
    after = f"<p class='faint'>Cycles of the learning rate (peak): {escape(cycles)}.</p>" if cycles else ""
    return f"<ol>{''.join(items)}</ol>{after}"


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Device, seed, duration and versions, by name."""
    facts = [
        (name, str(result[name]))
        for name in ("device", "seed", "target_latency")
        if result.get(name) is not None
    ]
    if result.get("seconds") is not None:
        facts.append(("duration", f"{result['seconds'] / 60:.1f} min"))
    return facts + [(name, str(value)) for name, value in (result.get("versions") or {}).items()]
