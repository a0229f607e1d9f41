"""What the layers of a detector have to compute: where each runs, and how large it is after a rewrite."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from jdkd.detect.contract import detections
from jdkd.detect.proposals import full_proposals
from jdkd.graph import Topology
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite
from jdkd.rewrite.channels import checked, leaving

TURNED = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
PRODUCTS = F.linear, F.conv1d, F.conv2d, F.conv3d, *TURNED

Shapes = dict[str, tuple[int, ...]]
"""Shapes of weights, by name."""


class _Positions(TorchFunctionMode):
    """Counts at how many places every weight of a model is applied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.found: dict[str, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and len(args) > 1 and (name := self._names.get(id(args[1]))) is not None:
            over = args[0] if func in TURNED else out
            self.found[name] = self.found.get(name, 0.0) + over.numel() / args[1].shape[0]
        return out


def positions(model: nn.Module, image: Tensor) -> dict[str, float]:
    """At how many places of an image each layer is applied, by the name of its weight; levels are added up.

    A two-stage detector is charged with as many proposals as it may keep.

    Args:
        model: a detector; left as it was.
        image: ``[3, H, W]``, uint8 or floats in 0..1.
    """
    counting = _Positions(model)
    with mode(model, training=False), full_proposals(model), torch.no_grad(), counting:
        detections(model, [as_floats(image, model)])
    return counting.found


def as_floats(image: Tensor, model: nn.Module) -> Tensor:
    """An image ``[3, H, W]``, uint8 or floats in 0..1, as floats on a model's device."""
    like = next(model.parameters())
    image = image.to(like.device)
    return image.to(like.dtype).div_(255) if image.dtype == torch.uint8 else image


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of all weights of a model that can be a product's."""
    return {name: tuple(tensor.shape) for name, tensor in unwrapped(model).named_parameters() if tensor.dim() > 1}


def shapes_after(model: nn.Module, topology: Topology, rewrite: Rewrite) -> Shapes:
    """Shapes of the weights of a rewritten model, without rewriting it.

    A block that is named again in a list has, as a copy, a name of its own.

    Args:
        model: what ``topology`` was read off.
        topology: what is coupled to what.
        rewrite: what would be done.
    """
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    chosen = {name: checked(topology, name, units) for name, units in rewrite.keep.items()}
    for (tensor, dim), places in leaving(topology, chosen).items():
        if tensor in shapes:
            shapes[tensor][dim] -= len(places)
    for name, count in rewrite.extra.items():
        for slot in topology[name].slots:
            if slot.tensor in shapes:
                shapes[slot.tensor][slot.dim] += count * slot.repeat
    for name, order in rewrite.blocks.items():
        for place, path in enumerate(topology.block_list(name).blocks):
            inside = [each for each in shapes if each.startswith(f"{path}.")]
            for copy in range(1, list(order).count(place)):
                shapes |= {f"{path}+{copy}{each.removeprefix(path)}": shapes[each] for each in inside}
            if place not in order:
                for each in inside:
                    del shapes[each]
    return {name: tuple(shape) for name, shape in shapes.items()}


def place_of(name: str, containers: Iterable[str], known: Collection[str]) -> str | None:
    """The layer of a base that a layer of its descendant runs in the place of.

    That is the one of its name, or, as blocks come and go, the last one that is called the same in another block.

    Args:
        name: of a weight of the descendant.
        containers: paths of the modules that hold blocks.
        known: names of the base's weights.
    """
    if name in known:
        return name
    for container in containers:
        if name.startswith(f"{container}."):
            inside = name.removeprefix(f"{container}.").partition(".")[2]
            kin = [each for each in known if each.startswith(f"{container}.") and each.endswith(f".{inside}")]
            return kin[-1] if kin else None
    return None


def part_of(layer: str, containers: Iterable[str]) -> str:
    """The part of a detector that a layer belongs to: the module that holds its blocks, or else the one that holds it,
    two names deep at most and before any number."""
    around = [container for container in containers if layer.startswith(f"{container}.")]
    if around:
        return max(around, key=len)
    return ".".join(takewhile(lambda part: not part.isdigit(), layer.split(".")[:-1][:2])) or layer.partition(".")[0]
