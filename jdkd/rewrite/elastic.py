"""See :func:`make_elastic`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.graph import ChannelGroup, Slot, Topology
from jdkd.nn.coupling import ChannelSlot, ElasticGroups
from jdkd.nn.exchange import as_elastic, as_elastic_block, as_plain, elastic_class, plain_class
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.channels import require_traced, tensors_by_name

SIDES = "out", "in"  # by the dimension of a weight
VECTORS = "bias", "running_mean", "running_var"


def make_elastic(model: nn.Module, topology: Topology, groups: Iterable[ChannelGroup] | None = None) -> nn.Module:
    """Makes channel groups elastic in width and block lists in depth, in place; :func:`jdkd.nn.set_subnet` sets them.

    Layers and blocks change their class and nothing else: paths, state dict, parameters, hooks, attributes and modes
    are those that were there. All of the model is active. What cannot be elastic stays plain, and ``left_out`` of the
    model's ``elastic_groups`` says why.

    Args:
        model: what ``topology`` was read off; inside torch's wrappers too.
        topology: what is coupled to what.
        groups: which of its channel groups; by default those inside of residual blocks and of other runs of layers,
            :attr:`Topology.inner`.

    Returns:
        The model itself, with its ``elastic_groups``.

    Raises:
        InputError: it is elastic already, or the topology is of another model.
    """
    inner = unwrapped(model)
    if getattr(inner, "elastic_groups", None) is not None:
        raise InputError(f"make_elastic: this {type(inner).__name__} is elastic already; take that back by make_plain.")
    elastic = elastic_groups(inner, topology, groups)
    for path in _layers(elastic):
        as_elastic(inner.get_submodule(path))
    for path in _blocks(elastic):
        as_elastic_block(inner.get_submodule(path))
    vars(inner)["elastic_groups"] = elastic
    return model


def make_plain(model: nn.Module) -> nn.Module:
    """Takes back :func:`make_elastic`, in place: the whole of every layer and block is plain again.

    Returns:
        The model itself.

    Raises:
        InputError: a layer or block cannot be, see :func:`jdkd.nn.as_plain`; nothing has changed then.
    """
    inner = unwrapped(model)
    elastic = vars(inner).get("elastic_groups")
    if elastic is not None:
        modules = [inner.get_submodule(path) for path in (*_layers(elastic), *_blocks(elastic))]
        for module in modules:
            plain_class(module)
        for module in modules:
            as_plain(module)
        del inner.elastic_groups
    return model


def elastic_groups(model: nn.Module, topology: Topology, groups: Iterable[ChannelGroup] | None = None) -> ElasticGroups:
    """What :func:`make_elastic` would make elastic, and what it would leave out and why; nothing changes."""
    require_traced(model, topology)
    modules = dict(model.named_modules())
    owners = Counter(
        id(tensor)
        for module in modules.values()
        for table in (module._parameters, module._buffers)
        for tensor in table.values()
        if tensor is not None
    )
    tied = {name for name, tensor in tensors_by_name(model).items() if owners[id(tensor)] > 1}
    taken: dict[str, list[ChannelSlot]] = {}
    left_out: dict[str, str] = {}
    for group in topology.inner if groups is None else groups:
        sides, reason = _sides(modules, group, tied)
        if reason is None:
            taken[group.name] = sides
        else:
            left_out[group.name] = reason
    return ElasticGroups(taken, {blocks.name: blocks.blocks for blocks in topology.block_lists}, left_out)


def _layers(elastic: ElasticGroups) -> Iterable[str]:
    return dict.fromkeys(side.module for sides in elastic.slots.values() for side in sides)


def _blocks(elastic: ElasticGroups) -> Iterable[str]:
    return dict.fromkeys(path for paths in elastic.stages.values() for path in paths)


def _sides(
    modules: Mapping[str, nn.Module], group: ChannelGroup, tied: set[str]
) -> tuple[list[ChannelSlot], str | None]:
    """The sides of layers that make up a group, or why it cannot be elastic."""
    found: dict[tuple[str, str], list[Slot]] = defaultdict(list)
    for slot in group.slots:
        path, _, leaf = slot.tensor.rpartition(".")
        layer = modules[path]
        if elastic_class(type(layer)) is None:
            what = f"{path} is" if leaf in ("weight", *VECTORS) else f"{slot.tensor} is of"
            return [], f"{what} a {type(layer).__name__}, which has no elastic form"
        if slot.tensor in tied:
            return [], f"{slot.tensor} is shared by several layers"
        if leaf not in ("weight", *VECTORS) or slot.dim > 1:
            return [], f"{slot.tensor} (dimension {slot.dim}) is no side of a {type(layer).__name__}"
        tensor = getattr(layer, leaf)
        if slot.places.size != tensor.shape[slot.dim]:
            return [], f"other channels stand beside it in dimension {slot.dim} of {slot.tensor}, as in a concatenation"
        if slot.offset != 0:
            return [], f"its channels do not stand one after the other in dimension {slot.dim} of {slot.tensor}"
        found[path, SIDES[slot.dim]].append(slot)
    sides = []
    for (path, side), slots in found.items():
        if reason := _incomplete(modules[path], path, side, slots):
            return [], reason
        sides.append(ChannelSlot(path, side, slots[0].repeat))
    return sides, None


def _incomplete(layer: nn.Module, path: str, side: str, slots: list[Slot]) -> str | None:
    """Why a side of a layer cannot be set as a whole."""
    repeats = {slot.repeat for slot in slots}
    if len(repeats) > 1:
        return f"a unit takes {sorted(repeats)} places in the tensors of {path}"
    held = {slot.tensor.rpartition(".")[2] for slot in slots}
    of_side = ("weight", *VECTORS) if side == "out" else ("weight",)
    wanted = {name for name in of_side if isinstance(getattr(layer, name, None), Tensor)}
    if held != wanted:
        return f"{', '.join(sorted(wanted - held))} of {path} does not follow it"
    (repeat,) = repeats
    if getattr(layer, "groups", 1) > 1:
        per_group = cast(nn.Conv2d, layer).out_channels // cast(nn.Conv2d, layer).groups
        if side == "in" or repeat % per_group:
            return f"{path} is a grouped convolution, of which it is no whole groups"
    if isinstance(layer, nn.GroupNorm) and repeat % (layer.num_channels // layer.num_groups):
        return f"{path} is a group norm, of which it is no whole norm groups"
    return None
