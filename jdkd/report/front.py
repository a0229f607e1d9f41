"""See :func:`front_over_time`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from jdkd.report.outcome import KINDS, Outcome
from jdkd.report.svg import Axes, colour, key, spread, tag
from jdkd.search.archive import Candidate
from jdkd.search.choice import best_within, pareto_front

SHAPES = {  # of a mark with a radius of about 1
    "base": "M-.9-.9H.9V.9H-.9Z",
    "morph": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0Z",
    "teacher": "M0-1.15L1.1.85H-1.1Z",
    "train": "M0-1.2L1.2 0L0 1.2L-1.2 0Z",
    "student": "M0-1.25L.37-.45L1.2-.36L.58.2L.75 1.02L0 .6L-.75 1.02L-.58.2L-1.2-.36L-.37-.45Z",
}


def front_over_time(outcome: Outcome) -> str:
    """mAP against latency of every candidate, with a slider that takes the search back to an earlier generation.

    Args:
        outcome: of a search, finished or under way.

    Returns:
        HTML; without scripts, and on paper, it shows the whole search.
    """
    candidates = outcome.scored
    generations = sorted({one.generation for one in candidates})
    ratios = [one.latency_ratio for one in candidates] + outcome.targets
    axes = Axes(
        spread(ratios),
        spread(one.map for one in candidates),
        ("latency, end to end, relative to the base", "mAP on the images that select"),
    )
    inside = [_targets(outcome.targets, axes)]
    for line in outcome.lines:
        points = [(one.latency_ratio, one.map) for one in line if one.failure is None]
        inside.append(tag("path", d=axes.path(points), class_="lineage"))
    for generation in generations:
        front = pareto_front([one for one in candidates if one.generation <= generation])
        points = [(one.latency_ratio, one.map) for one in front]
        now = generation == generations[-1]
        path = axes.path(points, steps=True)
        inside.append(tag("path", d=path, class_="front", data_at=generation, hidden=None if now else "hidden"))
    inside += [_point(one, generations, axes) for one in candidates]
    for id_, title in outcome.chosen.items():
        one = outcome.by_id[id_]
        place = axes.x(one.latency_ratio), axes.y(one.map)
        inside.append(mark("student", *place, 9, "chosen", f"{title}: {_told(one)}"))
    title = "mAP against latency of every candidate, by generation"
    chart = axes.drawing("".join(inside), title, class_="chart wide", id="front")
    return f'<div class="scroll">{chart}</div>{_slider(generations, candidates, outcome.targets)}{_legend(candidates)}'


def mark(kind: str, x: float, y: float, radius: float, class_: str = "", title: str = "", **more: str | int) -> str:
    """A mark of a kind of candidate at a place of a drawing."""
    inside = tag("title", title) if title else ""
    shape = {"d": SHAPES.get(kind, SHAPES["morph"]), "transform": f"translate({x:.1f} {y:.1f}) scale({radius:g})"}
    return tag("path", None, inside, **shape, class_=class_ or None, **more)


def _point(one: Candidate, generations: Sequence[int], axes: Axes) -> str:
    own = one.generation
    share = generations.index(own) / max(1, len(generations) - 1)
    x, y = axes.x(one.latency_ratio), axes.y(one.map)
    if one.kind == "base":
        return mark("base", x, y, 6, "base", _told(one), data_g=own)
    return mark(one.kind, x, y, 5, "point", _told(one), data_g=own, fill=colour(share))


def _targets(targets: Sequence[float], axes: Axes) -> str:
    drawn = []
    for target in targets:
        x = axes.x(target)
        drawn.append(tag("line", x1=x, x2=x, y1=axes.top, y2=axes.bottom, class_="target"))
        drawn.append(tag("text", f"asked: {target:g}", x=x + 4, y=axes.bottom - 6, class_="asked"))
    return "".join(drawn)


def _slider(generations: Sequence[int], candidates: Sequence[Candidate], targets: Sequence[float]) -> str:
    """What shows the search as it stood after a generation; nothing where there is one generation alone."""
    if len(generations) < 2:
        return ""
    told = {}
    for generation in generations:
        then = [one for one in candidates if one.generation <= generation]
        made = len(then) - 1
        best = [(target, best_within(then, target)) for target in targets]
        reached = "; ".join(f"best within {target:g}: {one.map:.3f}" for target, one in best if one)
        told[generation] = f"generation {generation} of {generations[-1]}, {made} candidate{'s' * (made != 1)}" + (
            f"; {reached}" if reached else ""
        )
    last, texts = len(generations) - 1, escape(json.dumps([*map(list, told.items())]))
    limits = f'type="range" min="0" max="{last}" value="{last}"'
    return (
        f'<p class="slider"><label for="generation">back in time</label> <input id="generation" {limits} '
        f'data-told="{texts}"> <output for="generation">{told[generations[-1]]}</output></p>'
    )


def _legend(candidates: Sequence[Candidate]) -> str:
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in candidates)]
    keys = [key(mark("base", 8, 8, 5, "base"), "base")]
    keys += [key(mark(kind, 8, 8, 5, fill=colour(0.35)), KINDS[kind]) for kind in kinds]
    keys.append(key(mark("student", 8, 8, 7, "chosen"), "chosen as a student"))
    ramp = "".join(tag("rect", x=12 * k, y=3, width=12, height=10, fill=colour(k / 4)) for k in range(5))
    keys.append(key(ramp, "early to late", 60))
    return f'<p class="legend">{"".join(keys)}</p>'


def _told(one: Candidate) -> str:
    """A candidate in a line, for who points at it."""
    return f"{one.number}: {one.action}; mAP {one.map:.3f} at {one.latency_ratio:.3f}, generation {one.generation}"
