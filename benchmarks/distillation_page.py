"""What the rows of :mod:`benchmarks.distillation` say: tables, sentences and curves of `docs/experiments/`.

Everything is read off the rows, the verdicts too; `python -m benchmarks.readme` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks import markdown
from benchmarks.resampling import gained
from jdkd.distill.training import ONE_STAGE, TWO_STAGE
from jdkd.report.svg import Axes, drawing, spread, tag

Row = dict[str, Any]
NOBODY, NONE, PKD, AUTO = "nobody", "none", "pkd", "auto"
HALF = "pkd_half"  # PKD for the first half of the steps, and then nobody
ALIGNED = {f"pkd_{align}": align for align in ("permute", "linear")}  # PKD once channels were brought together
INHERIT, INHERIT_PKD = "none_inherit", "pkd_inherit"  # begun with the teacher's neck and heads
INHERITED = {INHERIT: NONE, INHERIT_PKD: PKD}
STEPS = 800  # of a student, unless it is asked what a teacher is worth over the length of a training
TITLES = {
    "digit_scenes": "Digit scenes",
    "digit_scenes_one_class": 'Digit scenes in which every digit is of the class "digit"',
    "blood_cells": "Photographs of blood cells",
    "blood_cells_imagenet": "The same photographs, under backbones that know ImageNet",
}
# Okabe and Ito, Color Universal Design (2008)
COLOURS = {NONE: "#6E6E6E", PKD: "#D55E00", "mse": "#0072B2", "cwd": "#E69F00", HALF: "#009E73"}
COLOURS |= dict(zip(ALIGNED, ("#CC79A7", "#56B4E9"), strict=True))
PANEL, LEGEND = (250, 220), 26  # width and height in pixels
STYLE = "text{font:11px sans-serif;fill:#6E6E6E}.grid{stroke:#6E6E6E;stroke-opacity:.25}"
ASKED = 2  # pairs on which PKD is to win
GAIN = "gain over none (95 %)"


def latest(kept: Iterable[Row]) -> list[Row]:
    """The last row of each way."""
    names = ("data", "teacher", "student", "loss", "weight", "head", "steps")
    return [*{tuple(row.get(name) for name in names): row for row in kept}.values()]


def page(kept: Iterable[Row]) -> str:
    """Markdown: for each data set a verdict, a table, curves, the sweep of weights, other lengths and inheriting."""
    rows, parts = latest(kept), []
    for data in dict.fromkeys(row["data"] for row in rows):
        every = [row for row in rows if row["data"] == data]
        own = plain(every)
        parts += [f"### {TITLES.get(data, data)}", _facts(own, "student"), verdict(own), table(own)]
        if chart(own):
            parts.append(f"![mAP of students in training, by pair and loss]({chart_name(data)})")
        parts += [sweep(every), lengths(every), inherited(every)]
    return "\n\n".join(filter(None, parts)) or "Not measured."


def plain(rows: Iterable[Row]) -> list[Row]:
    """Rows of students of the usual length that begin with weights of their own."""
    return [row for row in rows if row["steps"] == STEPS and row["loss"] not in INHERITED]


def pairs(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Teacher and student of all taught rows, in their order."""
    return list(dict.fromkeys((row["teacher"], row["student"]) for row in rows if row["loss"] != NONE))


def of(rows: Iterable[Row], pair: tuple[str, str], loss: str) -> Row | None:
    """The row of a pair and a loss at its own weight; of no distillation that of the student alone."""
    teacher = NOBODY if loss == NONE else pair[0]
    wanted = {"teacher": teacher, "student": pair[1], "loss": loss, "weight": AUTO}
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def wins(row: Row) -> bool:
    """Whether a gain is more than the spread over seeds and images: all of its interval lies above 0."""
    return row["gain_interval"][0] > 0


def verdict(rows: Sequence[Row]) -> str:
    """What came out, in sentences."""
    taught = {pair: row for pair in pairs(rows) if (row := of(rows, pair, PKD)) is not None}
    if not taught:
        return ""
    won = [pair for pair, row in taught.items() if wins(row)]
    said = f"In {STEPS} steps PKD beats training without a teacher by more than the spread on {len(won)} of "
    said += f"{len(taught)} pairs"
    said += f" ({', '.join(map(name, won))})" if won else ""
    met = "met" if len(won) >= ASKED else "not met"
    sentences = [f"**{said}; at least {ASKED} were asked for, which is {met}.**"]
    if lost := [_loss_of(rows, pair, row) for pair, row in taught.items() if pair not in won]:
        sentences.append(f"It does not on {'; '.join(lost)}.")
    rivals = {loss for row in rows if (loss := row["loss"]) not in (NONE, PKD, HALF, *ALIGNED)}
    if rivals:
        beside = [pair for pair in taught if any(of(rows, pair, loss) for loss in rivals)]
        first = [pair for pair in beside if all(_less(of(rows, pair, loss), taught[pair]) for loss in rivals)]
        sentences.append(
            f"Its gain is the largest of {', '.join([PKD, *sorted(rivals)])} on {len(first)} of {len(beside)} pairs"
            + (f" ({', '.join(map(name, first))})." if first else ".")
        )
    if early := _convergence(rows, taught):
        sentences.append(early)
    if half := _half(rows):
        sentences.append(half)
    sentences += filter(None, (_aligned(rows, loss) for loss in ALIGNED))
    return " ".join(sentences)


def _half(rows: Sequence[Row]) -> str:
    """What comes of it where PKD teaches for the first half of the steps only."""
    taught = {pair: row for pair in pairs(rows) if (row := of(rows, pair, HALF)) is not None}
    won = [pair for pair, row in taught.items() if wins(row)]
    gains = "; ".join(f"{name(pair)} {gained(row)}" for pair, row in taught.items())
    return (
        "**Where PKD teaches for the first half of the steps and nobody for the rest, it beats training without a "
        f"teacher by more than the spread on {len(won)} of {len(taught)} pairs**: {gains}."
        if taught
        else ""
    )


def _aligned(rows: Sequence[Row], loss: str) -> str:
    """What PKD gains, and what it gains as the channels come, where these were brought together first."""
    found = [(pair, row, of(rows, pair, PKD)) for pair in pairs(rows) if (row := of(rows, pair, loss)) is not None]
    gains = (
        f"{name(pair)} {gained(row)}" + ("" if plain is None else f", without {gained(plain)}")
        for pair, row, plain in found
    )
    return f"What PKD gains with --align {ALIGNED[loss]}: {'; '.join(gains)}." if found else ""


def _less(rival: Row | None, row: Row) -> bool:
    return rival is None or rival["gain"] < row["gain"]


def _loss_of(rows: Sequence[Row], pair: tuple[str, str], row: Row) -> str:
    """How much a pair misses, and whether its teacher had anything to teach."""
    alone, behind = of(rows, pair, NONE), ", which is behind" if row["gain_interval"][1] < 0 else ""
    known = f"the teacher scores {row['teacher_map']:.3f}"
    known += "" if alone is None else f", the student alone {np.mean(alone['maps']):.3f}"
    return f"{name(pair)}: {gained(row)}{behind} ({known})"


def _convergence(rows: Sequence[Row], taught: dict[tuple[str, str], Row]) -> str:
    """After how many steps taught students have what untaught ones end with."""
    found = []
    for pair, row in taught.items():
        if (alone := of(rows, pair, NONE)) is None:
            continue
        curve, aim = _curve(row), _curve(alone)[-1]
        at = next((number for number, value in enumerate(curve, 1) if value >= aim), None)
        when = "never" if at is None else f"after {at * row['steps'] // len(curve)} of {row['steps']}"
        found.append(f"{name(pair)} {when}")
    return (
        f"Steps until it has, on average over seeds, what training without a teacher ends with: {'; '.join(found)}."
        if found
        else ""
    )


def table(rows: Sequence[Row]) -> str:
    """A way a row: students alone first, then by pair."""
    headings = ("teacher (mAP)", "student", "loss", "mAP by seed", "mean", GAIN, "after each quarter")
    lines = []
    order = {NONE: -1} | {pair: number for number, pair in enumerate(pairs(rows))}
    usual = [row for row in rows if row["weight"] == AUTO]
    for row in sorted(usual, key=lambda row: order[NONE if row["loss"] == NONE else (row["teacher"], row["student"])]):
        taught = row["loss"] != NONE
        teacher = f"{row['teacher']} ({row['teacher_map']:.3f})" if taught else "–"
        curve = " ".join(f"{value:.3f}" for value in _curve(row))
        gain = gained(row) if taught else "–"
        lines.append((teacher, row["student"], row["loss"], *_seeds_and_mean(row), gain, curve))
    return markdown.table(headings, "lllr", lines)


def sweep(rows: Sequence[Row]) -> str:
    """For each pair and length of training with several weights of PKD a table, and which is the best."""
    parts, swept = [], [row for row in rows if row["weight"] != AUTO]
    for pair, steps in dict.fromkeys((_pair(row), row["steps"]) for row in swept):
        own = [row for row in swept if (_pair(row), row["steps"]) == (pair, steps)]
        own.sort(key=lambda row: row["weight"])
        best = max(own, key=lambda row: row["gain"])
        published = TWO_STAGE if any("rcnn" in each for each in pair) else ONE_STAGE
        won = [f"{row['weight']:g}" for row in own if wins(row)]
        lines = ((f"{row['weight']:g}", scores(row), gained(row)) for row in own)
        parts += [
            f"Weights of PKD, {name(pair)}, {steps} steps: the best of {len(own)} is {best['weight']:g} (the published "
            f"one is {published:g}); the whole interval lies above 0 at {', '.join(won) if won else 'none of them'}.",
            markdown.table(("weight", "mAP by seed", GAIN), "r", lines),
        ]
    return "\n\n".join(parts)


def lengths(rows: Sequence[Row]) -> str:
    """A table of what losses gain in trainings of several lengths, each annealed to its end; empty without any."""
    usual = [row for row in rows if row["weight"] == AUTO and row["loss"] not in INHERITED]
    several = [pair for pair in pairs(usual) if len({row["steps"] for row in usual if _pair(row) == pair}) > 1]
    if not several:
        return ""
    taught = sorted((row for row in usual if _pair(row) in several), key=lambda row: row["steps"])
    won: dict[int, list[bool]] = {}  # of PKD, by length
    for row in (row for row in taught if row["loss"] == PKD):
        won.setdefault(row["steps"], []).append(wins(row))
    said = ", ".join(f"{sum(each)} of {len(each)} in {steps} steps" for steps, each in won.items())
    headings, lines = ("pair", "steps", "untaught", "loss", "mAP by seed", "mean", GAIN), []
    for pair in several:
        for row in (row for row in taught if _pair(row) == pair):
            alone = of([each for each in rows if each["steps"] == row["steps"]], pair, NONE)
            untaught = "–" if alone is None else f"{np.mean(alone['maps']):.3f}"
            lines.append((name(pair), row["steps"], untaught, row["loss"], *_seeds_and_mean(row), gained(row)))
    return (
        "Gains in trainings of several lengths, under one teacher. **PKD beats training without a teacher by more than "
        f"the spread on this many pairs: {said}.**\n\n{markdown.table(headings, 'lrrlr', lines)}"
    )


def inherited(rows: Sequence[Row]) -> str:
    """A table of students that begin with the teacher's neck and heads, where there are some."""
    own = [row for row in rows if row["loss"] in INHERITED]
    if not own:
        return ""
    headings = ["teacher", "student", "steps", "inherits, mAP by seed", "mean", GAIN]
    headings += ["inherits and PKD, mAP by seed", "mean", "gain over inheriting (95 %)"]
    lines = []
    for pair in pairs(own):
        for steps in sorted({row["steps"] for row in own if _pair(row) == pair}):
            cells = [*pair, steps]
            for loss in INHERITED:
                row = of([each for each in own if each["steps"] == steps], pair, loss)
                cells += ["–"] * 3 if row is None else [*_seeds_and_mean(row), gained(row)]
            lines.append(cells)
    said = "Students that begin with the teacher's neck and heads (`--inherit`); what PKD gains is over them:"
    return f"{said}\n\n{markdown.table(headings, 'llr', lines)}"


def _pair(row: Row) -> tuple[str, str]:
    return row["teacher"], row["student"]


def _seeds_and_mean(row: Row) -> tuple[str, str]:
    return scores(row), f"{np.mean(row['maps']):.3f}"


def swaps(kept: Iterable[Row]) -> str:
    """Markdown: what the features of taught students are worth under another head."""
    rows, parts = latest(kept), []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        taught = [row for row in own if row["loss"] != NONE]
        won = [row for row in taught if wins(row)]
        lines = []
        for row in sorted(own, key=lambda row: row["student"]):
            by, gain = ("nobody", "–") if row["loss"] == NONE else (f"{row['teacher']}, {row['loss']}", gained(row))
            lines.append((row["student"], by, row["head"], scores(row), gain))
        parts += [
            f"### {TITLES.get(data, data)}",
            _facts(own, "head"),
            "**Under a head that is trained anew, the features of a PKD student beat those of an untaught one by more "
            f"than the spread on {len(won)} of {len(taught)} pairs.**",
            markdown.table(("features of", "taught by", "head", "mAP by seed", GAIN), "lllr", lines),
        ]
    return "\n\n".join(parts) or "Not measured."


def charts(kept: Iterable[Row]) -> dict[str, str]:
    """The curves of each data set, an SVG by the name of its file."""
    rows = latest(kept)
    datas = dict.fromkeys(row["data"] for row in rows)
    made = {data: chart(plain(row for row in rows if row["data"] == data)) for data in datas}
    return {chart_name(data): svg for data, svg in made.items() if svg}


def chart_name(data: str) -> str:
    return f"distillation-{data}.svg"


def chart(rows: Sequence[Row]) -> str:
    """mAP after each part of the training, a panel a pair: the mean over seeds, and each seed faintly."""
    usual = [row for row in rows if row["weight"] == AUTO]
    shown = pairs(usual)
    if not shown:
        return ""
    scale = spread(value for row in usual for curve in row["curves"] for value in curve)
    steps, panels = max(row["steps"] for row in usual), []
    for number, pair in enumerate(shown):
        axes = Axes((0, steps * 1.05), scale, ("step", "mAP"), PANEL, left=52)
        lines = [tag("text", name(pair), x=PANEL[0] / 2 + 20, y=10, text_anchor="middle")]
        for loss, colour in COLOURS.items():
            if (row := of(usual, pair, loss)) is not None:
                lines += [_line(axes, row, curve, colour, 0.3, 1) for curve in row["curves"]]
                lines.append(_line(axes, row, _curve(row), colour, 1, 2.2))
        place = f"translate({number * PANEL[0]} {LEGEND})"
        panels.append(tag("g", None, axes.frame(), *lines, transform=place))
    losses = [loss for loss in COLOURS if any(row["loss"] == loss for row in usual)]
    key = [tag("text", loss, x=60 + 70 * at, y=17, style=f"fill:{COLOURS[loss]}") for at, loss in enumerate(losses)]
    size = PANEL[0] * len(shown), PANEL[1] + LEGEND
    inside = tag("style", STYLE) + "".join(key + panels)
    return drawing(size, inside, "mAP of students in training", xmlns="http://www.w3.org/2000/svg") + "\n"


def _line(axes: Axes, row: Row, curve: Sequence[float], colour: str, opacity: float, width: float) -> str:
    points = [(number * row["steps"] / len(curve), value) for number, value in enumerate(curve, 1)]
    look = {"fill": "none", "stroke": colour, "stroke_width": width, "stroke_opacity": opacity}
    return tag("path", None, d=axes.path(points), **look)


def _curve(row: Row) -> list[float]:
    """mAP after each part of the training, mean over seeds."""
    return np.mean(row["curves"], axis=0).tolist()


def _facts(rows: Sequence[Row], trained: str) -> str:
    """What the rows of a data set have in common."""
    steps = " or ".join(map(str, sorted({row["steps"] for row in rows})))
    seeds = " or ".join(map(str, sorted({len(row["seeds"]) for row in rows})))
    return f"{steps} steps of every {trained}, {seeds} seeds; on {', '.join(sorted({row['device'] for row in rows}))}."


def name(pair: tuple[str, str]) -> str:
    return " → ".join(pair)


def scores(row: Row) -> str:
    return " ".join(f"{value:.3f}" for value in row["maps"])
