"""See :func:`stages` and :func:`architecture_section`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape

from torch import nn

from jdkd.detect.input_size import input_size
from jdkd.errors import InputError
from jdkd.report.outcome import Outcome
from jdkd.report.svg import drawing, tag
from jdkd.rewrite import Architecture, build

WIDTH, GAP, HEIGHT = 9, 3, 64  # pixels of a layer's bar, between two, and of the highest
MOST = 44  # layers of a stage that are drawn


@dataclass(frozen=True)
class Layer:
    """A layer that makes channels, in the base and in the student.

    Args:
        name: path below its stage.
        base, student: channels that it makes; None where it is not there.
    """

    name: str
    base: int | None
    student: int | None


@dataclass(frozen=True)
class Stage:
    """A run of layers that belong together: a list of blocks, a neck's convolutions, a head.

    Args:
        name: path of what holds them.
        layers: in order; those that one of the two networks lacks stand where the other has them.
        blocks: how many blocks base and student have; None where it holds no list of blocks.
        params: parameters of base and student.
    """

    name: str
    layers: tuple[Layer, ...]
    blocks: tuple[int, int] | None
    params: tuple[int, int]

    @property
    def changed(self) -> bool:
        return any(layer.base != layer.student for layer in self.layers)


def stages(base: Architecture, student: Architecture) -> list[Stage]:
    """Base beside student, stage by stage, in the order of their layers.

    Args:
        base: what the student was derived from.
        student: of the same builder.

    Raises:
        InputError: one of them cannot be built.
    """
    models = build(base, "meta"), build(student, "meta")
    arranged = {*base.blocks, *student.blocks}
    found = [_layers(model, one, arranged) for model, one in zip(models, (base, student), strict=True)]
    made = []
    for name in _merged(list(found[0]), list(found[1])):
        ours, theirs = found[0].get(name, {}), found[1].get(name, {})
        layers = tuple(Layer(key[0], ours.get(key), theirs.get(key)) for key in _merged(list(ours), list(theirs)))
        counts, params = zip(*(_size(model, name) for model in models), strict=True)
        made.append(Stage(name, layers, None if None in counts else counts, params))
    return made


def _layers(model: nn.Module, known: Architecture, arranged: set[str]) -> dict[str, dict[tuple[str, int], int]]:
    """By stage, every layer that makes channels, and how many; copies of a block are told apart by a number."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2:
            continue
        stage = _stage_of(model, path)
        origin = _origin(model, path, known, arranged)[len(stage) :].lstrip(".")
        own, number = found.setdefault(stage, {}), 0
        while (origin, number) in own:
            number += 1
        own[origin, number] = int(weight.shape[0])
    return found


def _stage_of(model: nn.Module, path: str) -> str:
    """What a layer belongs to: the innermost list of blocks, else the outermost sequence, else its parent."""
    parts = path.split(".")
    above = [".".join(parts[:count]) for count in range(1, len(parts))]
    sequences = [name for name in above if isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList)]
    lists = [name for name in sequences if _blocks(model, name) > 1]
    return (lists[-1:] or sequences[:1] or above[-1:] or [path])[0]


def _blocks(model: nn.Module, path: str) -> int:
    """Children of a sequence that consist of several layers."""

    def weighted(module: nn.Module) -> int:
        return sum(getattr(one, "weight", None) is not None and one.weight.dim() > 1 for one in module.modules())

    return sum(weighted(child) > 1 for child in model.get_submodule(path).children())


def _origin(model: nn.Module, path: str, known: Architecture, arranged: set[str]) -> str:
    """A path with the numbers that the builder gave its blocks, whatever their place is now."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        container = ".".join(parts[:depth])
        if container in arranged:
            place = list(model.get_submodule(container)._modules).index(parts[depth])
            order = known.blocks.get(container)
            parts = [*parts]
            origin = place if order is None else order[place]
            path = ".".join([*path.split(".")[:depth], f"block {origin}", *path.split(".")[depth + 1 :]])
    return path


def _size(model: nn.Module, stage: str) -> tuple[int | None, int]:
    """Blocks and parameters of a stage; no blocks where its children are layers."""
    try:
        module = model.get_submodule(stage)
    except AttributeError:
        return None, 0
    names = [name for name, _ in module.named_modules() if name and _is_stage(model, stage, name)]
    inner = [f"{stage}.{name}" for name in names]
    params = sum(p.numel() for name, p in module.named_parameters() if not _inside(f"{stage}.{name}", inner))
    blocks = _blocks(model, stage) if isinstance(module, nn.Sequential | nn.ModuleList) else 0
    return blocks or None, params


def _is_stage(model: nn.Module, stage: str, name: str) -> bool:
    """Whether a module below a stage is a stage of its own."""
    path = f"{stage}.{name}"
    module = model.get_submodule(path)
    weighted = (f"{path}.{n}" for n, one in module.named_modules() if n and getattr(one, "weight", None) is not None)
    return any(_stage_of(model, layer) == path for layer in weighted if model.get_submodule(layer).weight.dim() > 1)


def _inside(path: str, stages: list[str]) -> bool:
    return any(path.startswith(f"{stage}.") for stage in stages)


def _merged(ours: list, theirs: list) -> Iterator:
    """Every item of two ordered lists once, each near where it stands."""
    for kind, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        yield from ours[a:b]
        if kind != "equal":
            yield from (item for item in theirs[c:d] if item not in ours)


def architecture_section(outcome: Outcome) -> str:
    """The base drawn beside every student, stage by stage.

    Args:
        outcome: of a search; without students yet, the best candidate so far is drawn.

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
    sizes = [input_size(build(one, "meta")) for one in (base, student)]
    sizes = [(size[0] if size else None) for size in sizes]
    return f'<h3>{escape(title)}</h3><div class="stages">{_input(*sizes)}{cards}</div>'


def _input(base: int | None, student: int | None) -> str:
    """The input's short side before and after, as squares."""
    if base is None or student is None:
        return ""
    most = max(base, student)
    side, own = HEIGHT * base / most, HEIGHT * student / most
    squares = tag("rect", x=1, y=HEIGHT - side + 1, width=side, height=side, class_="of-base") + tag(
        "rect", x=1, y=HEIGHT - own + 1, width=own, height=own, class_="of-student"
    )
    change = f"{base} → {student} px" if base != student else f"{base} px"
    picture = drawing((HEIGHT + 2, HEIGHT + 2), squares, "input size of base and student", width=HEIGHT + 2)
    return f"<figure>{picture}<figcaption><b>input</b><br>{change}, short side</figcaption></figure>"


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
