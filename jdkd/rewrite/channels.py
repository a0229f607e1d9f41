"""Cutting and growing channels: every tensor is gathered along the dimensions in which a group stands."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.graph import ChannelGroup, Slot, Topology
from jdkd.nn.elastic import Elastic

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
        InputError: there is no such group, its units are not in range, repeated, or none, a layer of it is elastic, or
            the topology is of another model.
    """
    require_traced(model, topology)
    chosen = {name: checked(topology, name, units) for name, units in keep.items()}
    gathers = {
        (tensor, dim): np.delete(np.arange(_size(model, tensor, dim)), gone)
        for (tensor, dim), gone in leaving(topology, chosen).items()
    }
    return gathered(model, gathers, {})


def leaving(topology: Topology, chosen: Mapping[str, np.ndarray]) -> dict[tuple[str, int], np.ndarray]:
    """Places along dimensions of tensors, ascending, that leave with the units that are not chosen of some groups."""
    return {
        place: np.sort(np.concatenate([np.delete(s.places, chosen[group.name], axis=0).ravel() for group, s in slots]))
        for place, slots in _slots(topology, chosen).items()
    }


def widen(model: nn.Module, topology: Topology, extra: Mapping[str, int]) -> nn.Module:
    """A copy of a model with more units, which nothing reads yet: what it computes stays the same.

    New units begin as copies of those that are there, in turn, so that they learn from a good place; where a product
    would read them its weights are 0 (Net2Net's widening, Chen et al., ICLR 2016, divides them instead).

    Args:
        model: the module that ``topology`` was read off.
        topology: what is coupled to what.
        extra: how many units to add, by the name of their group.

    Raises:
        InputError: there is no such group, it cannot grow, a number is negative, a layer of it is elastic, or the
            topology is of another model.
    """
    require_traced(model, topology)
    for name, count in extra.items():
        group = topology[name]
        whole(f"widen: extra of group {name!r}", [count])
        if count < 0:
            raise InputError(f"widen: group {name!r} is to get {count} units; give 0 or more, and prune to take away.")
        if not group.grows:
            raise InputError(f"widen: group {name!r} cannot grow, as the model's code holds on to places in it.")
    gathers, silent = {}, defaultdict(list)
    for (tensor, dim), slots in _slots(topology, extra).items():
        grown: dict[int, list[tuple[int, str]]] = defaultdict(list)  # before which place what is copied
        for group, slot in slots:
            for run in _runs(group, slot):  # [units, places side by side]
                descends = len(run) > 1 and run[0, 0] > run[1, 0]  # a flip: the new ones come first
                before = int(run.min() if descends else run.max() + 1)
                new = run[np.arange(extra[group.name]) % group.units]
                grown[before] += [(int(place), slot.role) for place in (new[::-1] if descends else new).ravel()]
        result: list[int] = []
        for place in range(_size(model, tensor, dim) + 1):
            for source, role in grown[place]:
                if role == "in":
                    silent[tensor, dim].append(len(result))
                result.append(source)
            result.append(place)
        gathers[tensor, dim] = np.array(result[:-1])
    return gathered(model, gathers, silent)


def _runs(group: ChannelGroup, slot: Slot) -> list[np.ndarray]:
    """Cuts the places of every unit into runs that stand side by side, ``[units, length]`` each.

    Raises:
        InputError: the units do not stand in order, so that nobody can tell where one more would.
    """
    places = slot.places
    cuts = np.flatnonzero((np.diff(places, axis=1) != 1).any(axis=0)) + 1
    runs = np.split(places, cuts, axis=1)
    for run in runs:
        steps = np.diff(run[:, 0])
        if not ((steps > 0).all() or (steps < 0).all()):
            raise InputError(
                f"widen: the channels of group {group.name!r} stand out of order in {slot.tensor!r}; it cannot grow."
            )
    return runs


def mask(model: nn.Module, topology: Topology, keep: Kept) -> nn.Module:
    """A copy of a model in which no product reads the units that are not kept: what :func:`prune` must agree with."""
    require_traced(model, topology)
    chosen = {name: checked(topology, name, units) for name, units in keep.items()}
    masked = duplicate(model)
    tensors = tensors_by_name(masked)
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
    units = np.array(sorted(whole(f"what group {name!r} is to keep", units)), dtype=np.int64)
    count = topology[name].units
    if not units.size or units[0] < 0 or units[-1] >= count or len(np.unique(units)) < len(units):
        raise InputError(
            f"group {name!r} has the units 0..{count - 1} and is to keep {units.tolist()[:8]}; name at least one, each "
            "once."
        )
    return units


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that do not go into the state dict too; tied ones once, by their first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def whole(what: str, numbers: Iterable[int]) -> list[int]:
    """Whole numbers of any kind, Python's, numpy's or tensors, as Python's.

    Raises:
        InputError: some are of another kind, as those of a mask are; ``what`` begins the message.
    """
    try:
        listed = list(numbers)
        if any(isinstance(number, bool) or getattr(number, "dtype", None) == torch.bool for number in listed):
            raise TypeError
        return [operator.index(number) for number in listed]
    except TypeError:
        raise InputError(f"{what} must be a list of whole numbers, got {numbers!r:.80}.") from None


def require_traced(model: nn.Module, topology: Topology) -> None:
    """Refuses a topology that was read off another model, or off this one before it was rewritten.

    Raises:
        InputError: the parameters are others, or of other sizes.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sizes == topology.sizes:
        return
    name = next(name for name in (*topology.sizes, *sizes) if sizes.get(name) != topology.sizes.get(name))
    now, then = (f"{each[name]} numbers" if name in each else "none" for each in (sizes, topology.sizes))
    raise InputError(
        f"the topology was read off another model: {name!r} has {now} in this {type(model).__name__} and had {then} "
        "there; read the model again after each rewrite."
    )


def _slots(topology: Topology, named: Mapping[str, object]) -> dict[tuple[str, int], list[tuple[ChannelGroup, Slot]]]:
    """The slots of some groups, by the dimension of the tensor that they stand in."""
    slots = defaultdict(list)
    for group in topology.groups:
        if group.name in named:
            for slot in group.slots:
                slots[slot.tensor, slot.dim].append((group, slot))
    return slots


def _size(model: nn.Module, tensor: str, dim: int) -> int:
    return tensor_named(model, tensor).shape[dim]


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name; tied ones by any of theirs."""
    return cast(Tensor, named(model, name))


def named(model: nn.Module, name: str) -> Tensor | nn.Module:
    """A parameter, buffer or module by its dotted name; tied ones by any of theirs."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


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

    Raises:
        InputError: a layer that is to change is elastic.
    """
    dims_of: dict[str, list[int]] = defaultdict(list)
    for tensor, dim in gathers:
        dims_of[tensor].append(dim)
    made = {
        id(tensor): taken(tensor, name, dims_of.get(name, ()), gathers, silent)
        for name, tensor in tensors_by_name(model).items()
    }
    changed = {id(made[id(named(model, name))]) for name in dims_of}
    copied = duplicate(model, made)
    for path, module in copied.named_modules():
        if any(id(tensor) in changed for tensor in (*module._parameters.values(), *module._buffers.values())):
            if isinstance(module, Elastic):  # what is active of it is counted in the channels that it had
                raise InputError(
                    f"{path!r} is an {type(module).__name__}, whose channels are not rewritten; take the active subnet "
                    "(jdkd.nn.export) or the whole (jdkd.rewrite.make_plain) as a plain model first."
                )
            renumber(module)
    return copied


def duplicate(model: nn.Module, made: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy of a model, in which other tensors may stand for those with some ids, wherever they are held.

    Raises:
        InputError: something in the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, {**made} if made else None)
    except (TypeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in ("_modules", "_parameters", "_buffers") and not _can_be_copied(value):
                    raise InputError(
                        f"the model cannot be copied: {name!r} of {path or type(model).__name__} is a "
                        f"{type(value).__name__} ({error}); set it aside, or give its class a __deepcopy__."
                    ) from error
        raise


def _can_be_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except (TypeError, RuntimeError, NotImplementedError, pickle.PicklingError):
        return False
    return True


def taken(
    tensor: Tensor,
    name: str,
    dims: Sequence[int],
    gathers: Mapping[tuple[str, int], np.ndarray],
    silent: Mapping[tuple[str, int], list[int]],
) -> Tensor:
    values = tensor.detach() if dims else tensor.detach().clone()
    for dim in dims:
        values = values.index_select(dim, torch.from_numpy(gathers[name, dim]).to(values.device))
        if places := silent.get((name, dim)):
            values.index_fill_(dim, torch.tensor(places, device=values.device), 0)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        values = values.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, requires_grad=tensor.requires_grad)
    vars(values).update(vars(tensor) | vars(values))  # what users hang on to it; its own is a subclass's numbers
    return values


def renumber(module: nn.Module) -> None:
    """Brings the sizes that a layer keeps as attributes in line with its tensors."""
    weight = cast(Tensor, getattr(module, "weight", None))  # where it is read, there is one
    if all(
        hasattr(module, name) for name in ("in_channels", "out_channels", "groups")
    ):  # also torchvision's deformable
        conv, turned = cast(nn.Conv2d, module), getattr(module, "transposed", False)
        if conv.groups > 1:  # whole groups went, or came
            conv.groups = weight.shape[0] * conv.groups // (conv.in_channels if turned else conv.out_channels)
        sides = weight.shape[0], weight.shape[1] * conv.groups
        conv.in_channels, conv.out_channels = sides if turned else sides[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = weight.shape[0] * module.num_groups // module.num_channels
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        module.normalized_shape = tuple(weight.shape)
    elif hasattr(module, "num_features"):
        held = (*module._parameters.values(), *module._buffers.values())
        features = next(tensor.shape[0] for tensor in held if tensor is not None and tensor.dim())
        cast(nn.BatchNorm2d, module).num_features = features
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
