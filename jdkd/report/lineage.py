"""See :func:`lineage_tree`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from jdkd.report.front import mark
from jdkd.report.outcome import Outcome, gains, signed
from jdkd.report.svg import tag
from jdkd.search.archive import Candidate

LANE, HEIGHT = 16, 30  # pixels between two lines of descent, and of a row
BAR = 34  # pixels of the longest bar on one side


@dataclass(frozen=True)
class Place:
    """A row of the tree.

    Args:
        candidate: whom it is about.
        lane: its line of descent, counted from the left.
        parent: the lane of its parent; None for the base.
        through: lanes of others that pass by.
        goes_on: whether a child follows below.
    """

    candidate: Candidate
    lane: int
    parent: int | None
    through: frozenset[int]
    goes_on: bool


def lineage_tree(outcome: Outcome) -> str:
    """Every candidate below its parent, with what its action gained and cost.

    A line of descent that leads to a student, or else to the best mAP, runs straight on; the others branch off first.

    Args:
        outcome: of a search, finished or under way.

    Returns:
        HTML.
    """
    students = outcome.chosen
    ancestors = {one.id for line in outcome.lines for one in line}
    places = list(arranged(outcome.candidates, ancestors))
    lanes = 1 + max(place.lane for place in places)
    changes = [gains(place.candidate, outcome.by_id.get(place.candidate.parent)) for place in places]
    most = [max((abs(change[k]) for change in changes if math.isfinite(change[k])), default=0) for k in (0, 1)]
    body = []
    for place, change in zip(places, changes, strict=True):
        one = place.candidate
        body.append(
            f'<tr class="{_class(one, students, ancestors)}"><td class="rails">{_rails(place, lanes, one.id, students)}'
            f'</td><td class="number">{one.number}</td><td class="what" title="{escape(_title(one))}">'
            f"{_what(one, students)}</td><td>{one.generation}</td>"
            f"<td class='text'>{escape(str(one.teacher or '–'))}</td><td>{one.steps:,}</td>"
            f"{_change(change[0], most[0], good=1)}<td>{_score(one.map)}</td>"
            f"{_change(change[1], most[1], good=-1)}<td>{_score(one.latency_ratio)}</td></tr>"
        )
    headings = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            *(("", ""), ("#", ""), ("what was done to the one it descends from", ' class="text"'), ("gen.", "")),
            *(("teacher", ' class="text"'), ("steps", ""), ("mAP gained", ' class="bars"'), ("mAP", "")),
            *(("latency added", ' class="bars"'), ("ratio", "")),
        )
    )
    return (
        f'<div class="scroll"><table class="tree"><thead><tr>{headings}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{_failures(outcome.candidates)}"
    )


def _failures(candidates: list[Candidate]) -> str:
    """What failed, and why; nothing where all went well."""
    told = [f"{one.number} failed: {one.failure}" for one in candidates if one.failure is not None]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in told)
    return f'<ul class="bad">{items}</ul>' if items else ""


def arranged(candidates: list[Candidate], ancestors: set[str]) -> Iterator[Place]:
    """Rows of the tree from the top down.

    Args:
        candidates: the archive, in order.
        ancestors: ids of the students and of those that they descend from.
    """
    children: dict[str | None, list[Candidate]] = {}
    for one in candidates:
        children.setdefault(one.parent, []).append(one)
    best: dict[str, float] = {}  # of a candidate and all that descend from it
    for one in reversed(candidates):  # a child comes after its parent
        own = -math.inf if math.isnan(one.map) else one.map
        best[one.id] = max([own, *(best[child.id] for child in children.get(one.id, []))])
    open_lanes: set[int] = set()
    waiting = [(one, 0, None) for one in reversed(children.get(None, []))]
    left = {one.id: len(children.get(one.id, [])) for one in candidates}
    while waiting:
        one, lane, parent = waiting.pop()
        if lane is None:  # branches off: the first lane that is free
            lane = next(k for k in range(len(open_lanes) + 1) if k not in open_lanes)
        if one.parent is not None:
            left[one.parent] -= 1
            if not left[one.parent]:
                open_lanes.discard(parent)
        through = frozenset(open_lanes - {lane})
        own = children.get(one.id, [])
        if own:
            open_lanes.add(lane)
        yield Place(one, lane, parent, through, bool(own))
        heir = max(own, key=lambda child: (child.id in ancestors, best[child.id]), default=None)
        waiting += [(heir, lane, lane)] if heir is not None else []
        waiting += [(child, None, lane) for child in reversed(own) if child is not heir]


def _rails(place: Place, lanes: int, own: str, students: dict[str, str]) -> str:
    """The piece of the tree that stands in a row."""
    x, middle = _x(place.lane), HEIGHT / 2
    drawn = [tag("line", x1=_x(lane), x2=_x(lane), y1=0, y2=HEIGHT, class_="rail") for lane in sorted(place.through)]
    if place.parent is not None:
        start = _x(place.parent)
        bend = f"M{start} 0C{start} {middle} {x} 0 {x} {middle}"
        drawn.append(tag("path", d=bend, class_="rail"))
    if place.goes_on:
        drawn.append(tag("line", x1=x, x2=x, y1=middle, y2=HEIGHT, class_="rail"))
    one = place.candidate
    if one.failure is not None:
        cross = f"M{x - 4} {middle - 4}l8 8m0-8l-8 8"
        drawn.append(tag("path", d=cross, class_="cross"))
    else:
        kind = "student" if own in students else one.kind
        drawn.append(mark(kind, x, middle, 7 if kind == "student" else 4.5, "chosen" if kind == "student" else "node"))
    width = LANE * lanes
    size = {"width": width, "height": HEIGHT, "viewBox": f"0 0 {width} {HEIGHT}"}
    return tag("svg", None, "".join(drawn), **size, aria_hidden="true")


def _x(lane: int) -> float:
    return LANE * (lane + 0.5)


def _class(one: Candidate, students: dict[str, str], ancestors: set[str]) -> str:
    names = {"failed": one.failure is not None, "marked": one.id in students, "ancestor": one.id in ancestors}
    return " ".join(name for name, holds in names.items() if holds)


def _what(one: Candidate, students: dict[str, str]) -> str:
    """What was done, and what became of it."""
    badge = f'<b class="badge">{escape(students[one.id])}</b>' if one.id in students else ""
    failed = ' <span class="bad">failed</span>' if one.failure is not None else ""
    return f"{badge}{escape(one.action)}{failed}"


def _title(one: Candidate) -> str:
    return one.action if one.failure is None else f"{one.action}; failed: {one.failure}"


def _change(value: float, most: float, good: int) -> str:
    """A cell with a bar to the left or to the right of a middle, and the number."""
    if not math.isfinite(value):
        return '<td class="bars"></td>'
    long = BAR * abs(value) / most if most else 0.0
    kind = "gain" if value * good > 0 else "loss"
    bar = tag("rect", x=BAR - long if value < 0 else BAR, y=3, width=long, height=8, class_=kind)
    axis = tag("line", x1=BAR, x2=BAR, y1=0, y2=14, class_="rail")
    drawn = tag("svg", None, bar, axis, width=2 * BAR, height=14, viewBox=f"0 0 {2 * BAR} 14", aria_hidden="true")
    return f'<td class="bars">{drawn} <span>{signed(value)}</span></td>'


def _score(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
