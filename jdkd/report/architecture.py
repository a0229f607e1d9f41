"""See :func:`architecture_section`."""

from __future__ import annotations

import re
from html import escape

from jdkd.detect.input_size import input_size
from jdkd.detect.regions import region_count
from jdkd.errors import InputError
from jdkd.report.outcome import Outcome
from jdkd.report.stages import Layer, Stage, stages
from jdkd.report.svg import drawing, tag
from jdkd.rewrite import Architecture, build

WIDTH, GAP, HEIGHT = 9, 3, 64  # pixels of a layer's bar, between two, and of the highest
MOST = 44  # layers of a stage that are drawn


def architecture_section(outcome: Outcome) -> str:
    """The base drawn beside every student, stage by stage.

    Args:
        outcome: of a search; without students yet, the fastest candidate so far is drawn.

    Returns:
        HTML; empty where nothing but the base is known.
    """
    drawn = []
    shown = [(title, outcome.by_id[id_]) for id_, title in outcome.chosen.items()]
    if not outcome.students and len(outcome.scored) > 1:
        shown = [("fastest so far", min(outcome.scored, key=lambda one: one.latency_ratio))]
    base = outcome.candidates[0].architecture
    for title, one in shown:
        try:
            drawn.append(_network(title, base, one.architecture))
        except InputError as error:
            drawn.append(f'<p class="faint">The architecture is not drawn: {escape(str(error))}</p>')
    return "".join(drawn)


def _network(title: str, base: Architecture, student: Architecture) -> str:
    made = stages(base, student)
    cards = "".join(map(_card, made))
    models = [build(one, "meta") for one in (base, student)]
    sizes = [(size[0] if (size := input_size(model)) else None) for model in models]
    regions = [region_count(model) for model in models]
    return f'<h3>{escape(title)}</h3><div class="stages">{_input(*sizes, _change(*regions, "regions"))}{cards}</div>'


def _change(base: int | None, student: int | None, unit: str) -> str:
    """A number of the base and the student's, in words; empty where they have none."""
    if base is None or student is None:
        return ""
    return f"{base} → {student} {unit}" if base != student else f"{base} {unit}"


def _input(base: int | None, student: int | None, regions: str) -> str:
    """The input's short side before and after, as squares, and how many regions are proposed in it."""
    if base is None or student is None:
        return ""
    most = max(base, student)
    side, own = HEIGHT * base / most, HEIGHT * student / most
    squares = tag("rect", x=1, y=HEIGHT - side + 1, width=side, height=side, class_="of-base") + tag(
        "rect", x=1, y=HEIGHT - own + 1, width=own, height=own, class_="of-student"
    )
    told = [f"{_change(base, student, 'px')}, short side", *([regions] if regions else [])]
    picture = drawing((HEIGHT + 2, HEIGHT + 2), squares, "input size of base and student", width=HEIGHT + 2)
    return f"<figure>{picture}<figcaption><b>input</b><br>{'<br>'.join(told)}</figcaption></figure>"


def _card(stage: Stage) -> str:
    """A stage: per layer a bar, the base's as an outline, the student's filled."""
    layers = stage.layers[:MOST]
    most = max(max(layer.base or 0, layer.student or 0) for layer in layers)
    bars = "".join(_bar(layer, number * (WIDTH + GAP) + 1, most) for number, layer in enumerate(layers))
    width = len(layers) * (WIDTH + GAP) + 1
    kept = [sum(getattr(layer, which) or 0 for layer in stage.layers) for which in ("base", "student")]
    told = [f"{' → '.join(f'{count:,}' for count in (kept if stage.changed else kept[:1]))} channels"]
    if stage.blocks is not None:
        before, after = stage.blocks
        told.insert(0, f"{before} → {after} blocks" if before != after else f"{before} block{'s' * (before != 1)}")
    params = [f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k" for count in stage.params]
    told.append(f"{' → '.join(dict.fromkeys(params))} params")
    picture = drawing((width, HEIGHT + 2), bars, f"channels of the layers of {stage.name}", width=width)
    more = f"<br>the first {MOST} of {len(stage.layers)} layers" if len(stage.layers) > MOST else ""
    caption = f"<b>{_name(stage.name)}</b><br>{'<br>'.join(told)}{more}"
    return f'<figure class="{"changed" if stage.changed else ""}">{picture}<figcaption>{caption}</figcaption></figure>'


def _bar(layer: Layer, x: int, most: int) -> str:
    before, after = ((HEIGHT * (count or 0) / most) for count in (layer.base, layer.student))
    told = f"{layer.name}: {layer.base or 'not in the base'} → {layer.student or 'cut'}"
    drawn = tag("title", told if layer.base != layer.student else f"{layer.name}: {layer.base}")
    kinds = "of-base" if layer.student else "of-base cut"
    drawn += tag("rect", x=x, y=HEIGHT - before + 1, width=WIDTH, height=before, class_=kinds) if before else ""
    kinds = "of-student" if layer.base else "of-student added"
    drawn += tag("rect", x=x, y=HEIGHT - after + 1, width=WIDTH, height=after, class_=kinds) if after else ""
    return f"<g>{drawn}</g>"


def _name(path: str) -> str:
    """A path that may be broken at its dots."""
    return re.sub(r"([._])", r"\1<wbr>", escape(path))
