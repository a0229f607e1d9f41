"""What the rows of :mod:`benchmarks.latency` say: sentences, tables and curves of latency over arithmetic.

Everything is read off the rows; `python -m benchmarks.readme` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from benchmarks import markdown
from benchmarks.record import Row
from jdkd.report.svg import Axes, drawing, spread, tag

# Okabe and Ito, Color Universal Design (2008)
COLOURS = {
    "eager": "#0072B2",
    "onnxruntime": "#D55E00",
    "compile": "#009E73",
    "cudagraph": "#CC79A7",
    "openvino": "#56B4E9",
}
OTHER, GREY = "#E69F00", "#6E6E6E"
MODES = {"end_to_end": "end to end", "model_only": "model only"}
PUBLISHED = 0.53  # of the base's latency: the -47 % of Joint-DetNAS (Yao et al., CVPR 2021), R101-FPN on COCO
CHART = "latency.svg"
PANEL, LEGEND, COLUMNS = (380, 290), 30, 2  # width and height in pixels, and panels side by side
STYLE = "text{font:11px sans-serif;fill:#6E6E6E}.grid{stroke:#6E6E6E;stroke-opacity:.25}"
GROUP = ("device", "base", "weights", "images", "dtype", "batch_size")  # what the rows of a table have in common


def latest(kept: Iterable[Row]) -> list[Row]:
    """The last row of each detector, runtime and mode."""
    return [*{(*_group(row), row["model"], row["runtime"], row["mode"]): row for row in kept}.values()]


def groups(kept: Iterable[Row]) -> list[list[Row]]:
    """Rows that belong in one table: of one base, on one device."""
    found: dict[tuple, list[Row]] = {}
    for row in latest(kept):
        found.setdefault(_group(row), []).append(row)
    return [*found.values()]


def _group(row: Row) -> tuple:
    return (*(row[name] for name in GROUP), *row["size"])


def page(kept: Iterable[Row]) -> str:
    """Markdown: the curves, and for each base sentences and a table."""
    rows, parts = [*kept], []
    if chart(rows):
        parts.append(f"![latency over multiply-accumulates, both over the base's]({CHART})")
    for own in groups(rows):
        parts += [f"### {title(own)}", _facts(own), verdict(own), table(own)]
    return "\n\n".join(filter(None, parts)) or "Not measured."


def title(own: Sequence[Row]) -> str:
    return f"{own[0]['base']}, {own[0]['size'][0]}x{own[0]['size'][1]}"


def _facts(own: Sequence[Row]) -> str:
    """What the rows of a table have in common, in a sentence."""
    row, commits = own[0], ", ".join(sorted({str(each["commit"]) for each in own}))
    said = f"{row['device']}; {row['dtype']}, batch {row['batch_size']}; {row['weights']} weights, {row['images']}"
    runtimes = {each["runtime"]: str(each["environment"]["runtime_version"]) for each in own}
    known = ", ".join(f"{name} {version}" for name, version in runtimes.items())
    return f"{said}; {known}; commit {commits}."


def runtimes(own: Iterable[Row]) -> list[str]:
    """The runtimes of rows, in the order of their colours."""
    named = [*COLOURS]
    return sorted({row["runtime"] for row in own}, key=lambda name: (named.index(name) if name in named else 9, name))


def curve(own: Iterable[Row], runtime: str, mode: str) -> list[Row]:
    """The base and its students in one runtime and mode, by arithmetic, the most first."""
    found = [row for row in own if (row["runtime"], row["mode"]) == (runtime, mode)]
    return sorted(found, key=lambda row: -row["macs_of_base"])


def verdict(own: Sequence[Row]) -> str:
    """At which share of the arithmetic each runtime takes the published share of the base's latency."""
    sentences = []
    for runtime in runtimes(own):
        for mode, words in MODES.items():
            if len(line := curve(own, runtime, mode)) > 1:
                doubt = "" if all(row["control"]["holds"] for row in line) else "; A/A fails, so none of it is resolved"
                sentences.append(f"{runtime}, {words}: {_reached(line)}{doubt}.")
                break  # the first mode that was measured
    return " ".join(sentences)


def _reached(line: Sequence[Row]) -> str:
    for above, below in pairwise(line):
        if below["ratio"] <= PUBLISHED < above["ratio"]:
            part = (above["ratio"] - PUBLISHED) / (above["ratio"] - below["ratio"])
            at = above["macs_of_base"] + part * (below["macs_of_base"] - above["macs_of_base"])
            return (
                f"**{_less(PUBLISHED)} of the latency at {_less(at)} of the multiply-accumulates** (interpolated "
                f"between {above['macs_of_base']:.2f} and {below['macs_of_base']:.2f} of them)"
            )
    last = f"{line[-1]['macs_of_base']:.2f} of the multiply-accumulates take {_ratio(line[-1])}"
    return f"{_less(PUBLISHED)} of the latency is not reached; {last}"


def _less(ratio: float) -> str:
    return f"−{100 * (1 - ratio):.0f} %"


def table(own: Sequence[Row]) -> str:
    """A detector in a runtime a line, with a column for every mode."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in own)]
    headings = ["runtime", "GMACs", "of the base's", "parameters"]
    headings += [heading for mode in modes for heading in (f"{MODES[mode]}, p50", "over the base (95 %)")]
    scored = any("map" in row["facts"] for row in own)
    headings += ["detections", *(["mAP"] if scored else [])]
    lines = []
    for runtime in runtimes(own):
        models = {row["model"]: row for mode in modes for row in curve(own, runtime, mode)}
        for model, row in sorted(models.items(), key=lambda item: -item[1]["macs_of_base"]):
            cells = [runtime, f"{row['gmacs']:.3g}", f"{row['macs_of_base']:.3f}", f"{row['params'] / 1e6:.1f} M"]
            for mode in modes:
                found = next((each for each in curve(own, runtime, mode) if each["model"] == model), None)
                cells += [f"{found['p50']:.4g} ms", _ratio(found)] if found else ["–", "–"]
            cells.append(f"{row['facts']['detections_per_image']:g}")
            if scored:
                cells.append(f"{row['facts']['map']:.3f}" if "map" in row["facts"] else "–")
            lines.append(cells)
    return markdown.table(headings, "lr", lines)


def _ratio(row: Row) -> str:
    """A ratio with its interval, and whether it can be believed."""
    if row["model"] == row["base"]:
        return "1" if row["control"]["holds"] else "1, A/A fails"
    low, high = row["ratio_interval"]
    doubt = " not resolved" if row["verdict"] == "not resolved" else ""
    return f"{row['ratio']:.3f} ({low:.3f}–{high:.3f}){doubt}"


def charts(kept: Iterable[Row]) -> dict[str, str]:
    """The curves, an SVG by the name of its file; nothing without rows of students."""
    drawn = chart(kept)
    return {CHART: drawn} if drawn else {}


def chart(kept: Iterable[Row]) -> str:
    """Latency over arithmetic, both over the base's: a panel a base, a colour a runtime, model only dashed."""
    shown = [own for own in groups(kept) if any(row["model"] != row["base"] for row in own)]
    if not shown:
        return ""
    everything = [row for own in shown for row in own]
    x = spread(row["macs_of_base"] for row in everything)
    y = spread([PUBLISHED, *(value for row in everything for value in row["ratio_interval"])])
    panels = []
    for number, own in enumerate(shown):
        across, down = number % COLUMNS * PANEL[0], number // COLUMNS * PANEL[1] + LEGEND
        name = title(own) + (f", {own[0]['device']}" if len({row["device"] for row in everything}) > 1 else "")
        panels.append(tag("g", None, _panel(own, name, x, y), transform=f"translate({across} {down})"))
    names = runtimes(everything)
    key = [
        tag("text", name, x=60 + 90 * at, y=17, style=f"fill:{COLOURS.get(name, OTHER)}")
        for at, name in enumerate(names)
    ]
    modes = "solid: end to end; dashed: model only; dotted: in proportion"
    key.append(tag("text", modes, x=60 + 90 * len(names), y=17))
    size = PANEL[0] * min(COLUMNS, len(shown)), PANEL[1] * -(-len(shown) // COLUMNS) + LEGEND
    inside = tag("style", STYLE) + "".join(key + panels)
    said = "latency of students over their multiply-accumulates, both over their base's"
    return drawing(size, inside, said, xmlns="http://www.w3.org/2000/svg") + "\n"


def _panel(own: Sequence[Row], name: str, x: tuple[float, float], y: tuple[float, float]) -> str:
    axes = Axes(x, y, ("multiply-accumulates over the base's", "latency over the base's"), PANEL, left=52)
    low, high = max(x[0], y[0]), min(x[1], y[1])
    level = axes.y(PUBLISHED)
    drawn = [
        axes.frame(),
        tag("text", name, x=PANEL[0] / 2 + 20, y=10, text_anchor="middle"),
        tag("path", None, d=axes.path([(low, low), (high, high)]), stroke=GREY, stroke_dasharray="1 4"),
        tag("line", x1=axes.left, x2=axes.right, y1=level, y2=level, stroke=GREY, class_="published"),
        tag("text", f"{_less(PUBLISHED)}, as published", x=axes.right - 4, y=level - 5, text_anchor="end"),
    ]
    for runtime in runtimes(own):
        for mode in MODES:
            if len(line := curve(own, runtime, mode)) > 1:
                drawn += _line(axes, line, COLOURS.get(runtime, OTHER), dashed=mode == "model_only")
    return "".join(drawn)


def _line(axes: Axes, line: Sequence[Row], colour: str, dashed: bool) -> list[str]:
    """A curve, with a bar for every interval."""
    look = {"fill": "none", "stroke": colour, "stroke_width": 1.8, "stroke_dasharray": "6 4" if dashed else None}
    drawn = [tag("path", None, d=axes.path([(row["macs_of_base"], row["ratio"]) for row in line]), **look)]
    for row in line:
        at, (low, high) = axes.x(row["macs_of_base"]), map(axes.y, row["ratio_interval"])
        drawn.append(tag("line", x1=at, x2=at, y1=low, y2=high, stroke=colour, stroke_width=1.8))
        drawn.append(tag("circle", cx=at, cy=axes.y(row["ratio"]), r=2.5, fill=colour))
    return drawn
