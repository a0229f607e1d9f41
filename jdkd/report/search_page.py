"""See :func:`page`."""

from __future__ import annotations

from html import escape
from typing import Any

from jdkd.report.architecture import architecture_section
from jdkd.report.costs import cost_section
from jdkd.report.front import front_over_time
from jdkd.report.latencies import aa_verdict, latency_section
from jdkd.report.layout import laid_out, made, table
from jdkd.report.lineage import lineage_tree
from jdkd.report.outcome import Outcome
from jdkd.report.predictions import predictions_section
from jdkd.report.scores import HEADINGS, rows
from jdkd.report.taught import taught_section
from jdkd.report.teachers import teachers_section
from jdkd.report.verdict import images_of, summary
from jdkd.search.archive import Candidate

_COLUMNS = (
    *("#", "gen.", "action", "teacher", "mAP", "mAP50", "ratio", "p50 / base's, ms", "M params", "GMACs"),
    *("steps", "lineage", "seconds", "id", "parent"),
)


def page(outcome: Outcome) -> str:
    """A page that tells a search by itself: one file that asks nothing of a network, and reads on paper too.

    Args:
        outcome: of a search, finished or under way.

    Returns:
        HTML. What the search has not written is left out, with its heading.
    """
    command = outcome.result.get("command") or outcome.run.get("command") or ""
    sections = {
        "result": ("Result", _result(outcome)),
        "over-time": ("The front over time", front_over_time(outcome)),
        "architecture": ("What was cut", _explained(_ARCHITECTURE, architecture_section(outcome))),
        "predictions": ("What base and student see", predictions_section(outcome)),
        "lineage": ("Lineage: what each action gained and cost", _lineage(outcome)),
        "teachers": ("Teachers", teachers_section(outcome)),
        "responses": ("What student and teacher respond to", taught_section(outcome)),
        "latency": ("Latency: how far to believe it", latency_section(outcome)),
        "cost": ("Where the time went", cost_section(outcome.result)),
        "candidates": ("Every candidate", _candidates(outcome)),
        "made": ("How it was made", made(command, _facts(outcome))),
    }
    return laid_out("Joint search for a student detector", summary(outcome), sections, _alarm(outcome))


_ARCHITECTURE = (
    "A bar is a layer and its height the channels that it makes: the base's as an outline, the student's filled; "
    "dashed is what is gone, and in another colour what was added. Names are the detector's own."
)
_LATENCY = (
    "Latency is end to end: from the decoded image on the host, through resizing, network and NMS, to the boxes on the "
    "host; base and student run in turn in one process. It is the latency of an architecture: all its measurements are "
    "pooled, and the control's is the base's. The control is the base trained for the steps of the longest lineage."
)
_TREE = (
    "A row stands below the one that it descends from; a line that leads to a student runs straight on. Scores are on "
    "the images that select; what is right of the middle was added, orange where that is a loss."
)
_ARCHIVE = (
    "Scores are on the images that select; * marks the Pareto front, shaded rows are students. Every ratio is that of "
    "the two medians beside it; the machine's own speed may differ from row to row."
)


def _explained(words: str, body: str) -> str:
    return f'<p class="faint">{escape(words)}</p>{body}' if body else ""


def _alarm(outcome: Outcome) -> str:
    """What makes the page's ratios worthless, on top of it."""
    aa = aa_verdict(outcome.result)
    return f'<p class="alarm">{escape(aa[1])}</p>' if aa is not None and not aa[0] else ""


def _result(outcome: Outcome) -> str:
    measured = rows(outcome.result)
    if not measured:
        return ""
    shown = table(HEADINGS, [(row.cells(), row.key == "student") for row in measured])
    return f'<p>{_data(outcome.result)}</p>{shown}<p class="faint">{_LATENCY}</p>'


def _lineage(outcome: Outcome) -> str:
    return _explained(_TREE, lineage_tree(outcome)) + _failed_control(outcome.result)


def _candidates(outcome: Outcome) -> str:
    best = {one.id for one in outcome.front}
    students = {one.candidate for one in outcome.students}
    body = [(_cells(one, one.id in best), one.id in students) for one in outcome.candidates]
    shown = f'<p class="faint">{_ARCHIVE}</p>{table(_COLUMNS, body)}'
    return f"<details><summary>{len(body):,} rows of the archive</summary>{shown}</details>"


def _cells(one: Candidate, on_front: bool) -> list[str]:
    """A candidate as text, in the order of `_COLUMNS`."""
    return [
        f"{one.number}{'*' if on_front else ''}",
        str(one.generation),
        one.action if one.failure is None else f"{one.action} (failed)",
        str(one.teacher or "–"),
        *_measured(one),
        f"{one.params / 1e6:.2f}",
        f"{one.gmacs:.2f}",
        f"{one.steps:,}",
        f"{one.lineage_steps:,}",
        f"{sum(one.seconds.values()):.0f}",
        one.id,
        one.parent or "–",
    ]


def _measured(one: Candidate) -> list[str]:
    """Scores and latency; dashes for one that failed."""
    if one.failure is not None:
        return ["–"] * 4
    milliseconds = f"{one.latency_p50:.2f} / {one.base_latency_p50:.2f}"
    return [f"{one.map:.3f}", f"{one.map50:.3f}", f"{one.latency_ratio:.3f}", milliseconds]


def _failed_control(result: dict[str, Any]) -> str:
    """Why the control could not be trained; nothing where it was."""
    why = (result.get("control") or {}).get("failure")
    return f'<p class="bad">{escape(f"The control failed: {why}")}</p>' if why else ""


def _data(result: dict[str, Any]) -> str:
    """Which images the search chose on, and which ones its result is of."""
    told = {"selection": "The search chose on", "report": "The result below is of"}
    sentences = [f"{words} {images}." for role, words in told.items() if (images := images_of(result, role))]
    after = ["None of them is a training image of this search."] if sentences else []
    return escape(" ".join(sentences + after))


def _facts(outcome: Outcome) -> dict[str, Any]:
    """Machine, seed, what the search was asked, when it ran, and versions, by name."""
    result = outcome.result
    device = result.get("device")
    facts = dict(device) if isinstance(device, dict) else {"device": device}
    facts |= {name: result.get(name) for name in ("seed", "target_map", "latency_ratio_is")}
    facts["begun"], facts["finished"] = outcome.run.get("started"), outcome.run.get("finished")
    versions = result.get("versions") or outcome.run.get("versions") or {}
    facts |= {name: one for name, one in versions.items() if name not in facts}
    return {name.replace("_", " "): value for name, value in facts.items()}
