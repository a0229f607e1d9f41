"""See :func:`stages`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import nn

from jdkd.rewrite import Architecture, build


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
