"""See :func:`page`."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from jdkd.report.outcome import HEADINGS, NAMES, Outcome, images_of, rows, verdict
from jdkd.search.archive import Candidate

_COLUMNS = (
    *("#", "action", "teacher", "mAP", "mAP50", "ratio", "p50 / base's, ms", "M params", "GMACs"),
    *("steps", "lineage", "seconds", "id", "parent"),
)
_TEXT = {"network", "action", "teacher", "id", "parent", "what", "value"}


def page(outcome: Outcome, plot: bytes) -> str:
    """A page that tells a search by itself: no scripts, no links, the plot inlined.

    Args:
        outcome: of a finished search.
        plot: a PNG.

    Returns:
        HTML.
    """
    result, best = outcome.result, {one.id for one in outcome.front}
    student, measured = result.get("student_id"), rows(result)
    command = result.get("command") or ""
    return Template(files("jdkd.report").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title="Joint search for a student detector",
        verdict=escape(verdict(result)),
        image=f"data:image/png;base64,{base64.b64encode(plot).decode()}",
        data=_data(result),
        result=_table(HEADINGS, [(row.cells(), row.key == "student") for row in measured]),
        lineage=_lineage(outcome.line),
        candidates=_table(_COLUMNS, [(_cells(one, one.id in best), one.id == student) for one in outcome.candidates]),
        failures=_failures(outcome),
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
        one.action if one.failure is None else f"{one.action} (failed)",
        str(one.teacher or "–"),
        *_measured(one),
        f"{one.params / 1e6:.2f}",
        f"{one.gmacs:.2f}",
        f"{one.steps:,}",
        f"{one.lineage_steps:,}",
        f"{one.seconds:.0f}",
        one.id,
        one.parent or "–",
    ]


def _measured(one: Candidate) -> list[str]:
    """Scores and latency; dashes for one that failed."""
    if one.failure is not None:
        return ["–"] * 4
    milliseconds = f"{one.latency_p50:.2f} / {one.base_latency_p50:.2f}"
    return [f"{one.map:.3f}", f"{one.map50:.3f}", f"{one.latency_ratio:.3f}", milliseconds]


def _failures(outcome: Outcome) -> str:
    """What failed and why, as a list; nothing where all went well."""
    told = [(f"candidate {one.number}", one.failure) for one in outcome.candidates if one.failure is not None]
    controls = {name: outcome.result.get(name) or {} for name in ("control", "control_single")}
    told += [(NAMES[name], entry["failure"]) for name, entry in controls.items() if "failure" in entry]
    items = "".join(f"<li>{escape(f'{name} failed: {why}')}</li>" for name, why in told)
    return f"<ul>{items}</ul>" if items else ""


def _lineage(line: Sequence[Candidate]) -> str:
    """The steps from the base to the student as an ordered list."""
    if not line:
        return "<p>The student is the base.</p>"
    items = []
    for one in line:
        teacher = f", taught by {one.teacher}" if one.teacher else ""
        cycle = f"; {one.steps:,} steps" if one.steps else ""
        scores = f"mAP {one.map:.3f} at {one.latency_ratio:.3f} of the base's time"
        items.append(f"<li>{escape(one.action)}{escape(teacher)}{cycle}<br><span class='faint'>{scores}</span></li>")
    stretches = [f"{one.start}–{one.start + one.steps} of {one.total} (peak {one.lr:g})" for one in line[-1].cycles]
    told = f"Steps of each learning-rate cycle that the student went through: {', '.join(stretches)}."
    after = f"<p class='faint'>{escape(told)}</p>" if stretches else ""
    return f"<ol>{''.join(items)}</ol>{after}"


def _data(result: dict[str, Any]) -> str:
    """Which images the search chose on, and which ones its result is of."""
    told = {"selection": "The search chose on", "report": "The result below is of"}
    sentences = [f"{words} {images}." for role, words in told.items() if (images := images_of(result, role))]
    after = ["None of them is a training image of this search."] if sentences else []
    return escape(" ".join(sentences + after))


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, seed, time that the candidates took, and versions, by name."""
    device = result.get("device")
    facts = dict(device) if isinstance(device, dict) else {"device": device}
    facts |= {name: result.get(name) for name in ("seed", "target_latency", "latency_ratio_is", "pool_steps")}
    if result.get("seconds") is not None:
        facts["time_of_all_candidates"] = f"{result['seconds'] / 60:.1f} min"
    facts |= {name: one for name, one in (result.get("versions") or {}).items() if name not in facts}
    return [(name.replace("_", " "), str(value)) for name, value in facts.items() if value is not None]
