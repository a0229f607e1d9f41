"""Cutting and growing channels: every tensor is gathered along the dimensions in which a group stands."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.graph import ChannelGroup, Slot, Topology

Kept = Mapping[str, Sequence[int]]


def prune(model: nn.Module, topology: Topology, keep: Kept) -> nn.Module:
    """A copy of a model with only some units of its channel groups.

    Everything else of it is kept: hooks, attributes, dtypes, devices, which parameters want gradients, and which are
    tied.

    Args:
        model: the module that ``topology`` was read off.
        topology: what is coupled to what.
        keep: units to keep, by the name of their group; groups that are not named stay whole.

    Returns:
        The copy; in evaluation mode it computes what the model would if nothing read the other units' channels.

    Raises:
        InputError: there is no such group, or its units are not in range, repeated, or none.
    """
    chosen = {name: checked(topology, name, units) for name, units in keep.items()}
    gathers = {}
    for (tensor, dim), slots in _slots(topology, chosen).items():
        gone = np.concatenate([np.delete(slot.places, chosen[group.name], axis=0).ravel() for group, slot in slots])
        gathers[tensor, dim] = np.delete(np.arange(_size(model, tensor, dim)), gone)
    return gathered(model, gathers, {})


def widen(model: nn.Module, topology: Topology, extra: Mapping[str, int]) -> nn.Module:
    """A copy of a model with more units, which nothing reads yet: what it computes stays the same.

    New units begin as copies of those that are there, in turn, so that they learn from a good place; where a product
    would read them its weights are 0 (Net2Net's widening, Chen et al., ICLR 2016, divides them instead).

    Args:
        model: the module that ``topology`` was read off.
        topology: what is coupled to what.
        extra: how many units to add, by the name of their group.

    Raises:
        InputError: there is no such group, or a number is negative.
    """
    for name, count in extra.items():
        checked(topology, name, [0])
        if count < 0:
            raise InputError(f"widen: group {name!r} is to get {count} units; give 0 or more, and prune to take away.")
    gathers, silent = {}, defaultdict(list)
    for (tensor, dim), slots in _slots(topology, extra).items():
        order = list(range(_size(model, tensor, dim)))
        grown: dict[int, list[tuple[int, str]]] = defaultdict(list)  # after which place what is copied
        for group, slot in slots:
            for number in range(extra[group.name]):
                grown[int(slot.places.max())] += [(int(p), slot.role) for p in slot.places[number % group.units]]
        result: list[int] = []
        for place in order:
            result.append(place)
            for source, role in grown[place]:
                if role == "in":
                    silent[tensor, dim].append(len(result))
                result.append(source)
        gathers[tensor, dim] = np.array(result)
    return gathered(model, gathers, silent)


def mask(model: nn.Module, topology: Topology, keep: Kept) -> nn.Module:
    """A copy of a model in which no product reads the units that are not kept: what :func:`prune` must agree with."""
    chosen = {name: checked(topology, name, units) for name, units in keep.items()}
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters()) | dict(masked.named_buffers())
    with torch.no_grad():
        for (tensor, dim), slots in _slots(topology, chosen).items():
            for group, slot in slots:
                if slot.role == "in":
                    gone = np.delete(slot.places, chosen[group.name], axis=0).ravel()
                    tensors[tensor].index_fill_(dim, torch.from_numpy(gone).to(tensors[tensor].device), 0)
    return masked


def checked(topology: Topology, name: str, units: Iterable[int]) -> np.ndarray:
    """Units of a group, ascending.

    Raises:
        InputError: there is no such group, or its units are not in range, repeated, or none.
    """
    groups = {group.name: group for group in topology.groups}
    if name not in groups:
        raise InputError(
            f"there is no channel group {name!r} that can be cut; there are {', '.join(sorted(groups)[:5])} and so on "
            f"({len(groups)}): see topology.groups."
        )
    units = np.array(sorted(int(unit) for unit in units), dtype=np.int64)
    count = groups[name].units
    if not units.size or units[0] < 0 or units[-1] >= count or len(np.unique(units)) < len(units):
        raise InputError(
            f"group {name!r} has the units 0..{count - 1} and is to keep {units.tolist()[:8]}; name at least one, each "
            "once."
        )
    return units


def _slots(topology: Topology, named: Mapping[str, object]) -> dict[tuple[str, int], list[tuple[ChannelGroup, Slot]]]:
    """The slots of some groups, by the dimension of the tensor that they stand in."""
    slots = defaultdict(list)
    for group in topology.groups:
        if group.name in named:
            for slot in group.slots:
                slots[slot.tensor, slot.dim].append((group, slot))
    return slots


def _size(model: nn.Module, tensor: str, dim: int) -> int:
    owner, _, name = tensor.rpartition(".")
    return getattr(model.get_submodule(owner), name).shape[dim]


def gathered(
    model: nn.Module,
    gathers: Mapping[tuple[str, int], np.ndarray],
    silent: Mapping[tuple[str, int], list[int]],
) -> nn.Module:
    """A copy whose tensors hold the given places of some dimensions, with zeros at the silent ones.

    Args:
        model: anything.
        gathers: by the name of a parameter or buffer (the first one of those that are tied) and a dimension, which
            places of it to take; a place may be taken more than once.
        silent: among the places that were taken, those that are set to 0.
    """
    copied = copy.deepcopy(model)
    before = {id(tensor): name for name, tensor in (*copied.named_parameters(), *copied.named_buffers())}
    by_tensor: dict[str, list[int]] = defaultdict(list)
    for tensor, dim in gathers:
        by_tensor[tensor].append(dim)
    made: dict[str, Tensor] = {}
    for module in copied.modules():
        changed = False
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                known = None if tensor is None else before.get(id(tensor))
                if known in by_tensor:
                    if known not in made:
                        made[known] = _taken(tensor, known, by_tensor[known], gathers, silent)
                    table[name], changed = made[known], True
        if changed:
            renumber(module)
    return copied


def _taken(
    tensor: Tensor,
    name: str,
    dims: Sequence[int],
    gathers: Mapping[tuple[str, int], np.ndarray],
    silent: Mapping[tuple[str, int], list[int]],
) -> Tensor:
    values = tensor.detach()
    for dim in dims:
        values = values.index_select(dim, torch.from_numpy(gathers[name, dim]).to(values.device))
        if places := silent.get((name, dim)):
            values.index_fill_(dim, torch.tensor(places, device=values.device), 0)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        values = values.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def renumber(module: nn.Module) -> None:
    """Brings the sizes that a layer keeps as attributes in line with its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        whole = module.in_channels if module.transposed else module.out_channels
        if module.groups > 1:  # whole groups went, or came
            module.groups = weight.shape[0] * module.groups // whole
        sides = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = weight.shape[0] * module.num_groups // module.num_channels
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        module.normalized_shape = tuple(weight.shape)
    elif hasattr(module, "num_features"):
        module.num_features = next(tensor.shape[0] for tensor in tensors_of(module))
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """A layer's own parameters and buffers that have a dimension."""
    for table in (module._parameters, module._buffers):
        yield from (tensor for tensor in table.values() if tensor is not None and tensor.dim())
