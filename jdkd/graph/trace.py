"""See :func:`trace`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.graph.channels import Channels
from jdkd.graph.declaration import Declaration
from jdkd.graph.residuals import Step
from jdkd.graph.topology import BlockList, ChannelGroup, Frozen, Slot, Topology, block_lists
from jdkd.graph.tracer import Tracer
from jdkd.nn.modes import mode


def trace(model: nn.Module, *example: Any, declared: Declaration | None = None, follow: str | None = None) -> Topology:
    """Reads off one eager forward which channels of a model live and die together.

    The model runs once in evaluation mode, as it is: no symbolic trace, no code per family, and control flow may depend
    on the data. An operator without a rule freezes the channels that pass it.

    Args:
        model: any module; its modes, weights and hooks are left as they were.
        *example: what its forward takes; for a torchvision detector a list of one image ``[3, H, W]``.
        declared: what is known of the model and does not show; it comes before what is read off.
        follow: path of a module whose feature maps' channels are wanted: a detector's neck.

    Returns:
        The topology. Have it checked: :func:`jdkd.rewrite.verify`.

    Raises:
        InputError: what is declared does not fit the model, or a parameter is lazy.
    """
    declared = declared or Declaration()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{name!r} has no shape yet; run the model once on an example before it is traced.")
    tracer = Tracer(model, declared.operators, follow)
    with mode(model, training=False), torch.random.fork_rng(devices=[]):
        tracer.run(example)
    channels = tracer.marks.channels
    declared.apply(channels)
    component = channels.components()
    groups, frozen, unit_of = _groups(channels, component, channels.reasons(component))
    reached = {axis.tensor for axis in channels.axes}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Topology(
        groups=groups,
        frozen=frozen,
        block_lists=_block_lists(model, tracer.residuals.steps, component),
        unknown={name: tuple(sorted(paths)) for name, paths in tracer.marks.unknown.items()},
        unreached=tuple(name for name in sizes if name not in reached and sizes[name] > 1),
        sizes=sizes,
        followed=tuple(tuple(map(unit_of.get, component[label].tolist())) for label in tracer.followed),
    )


def _groups(
    channels: Channels, component: np.ndarray, reasons: dict[int, str]
) -> tuple[tuple[ChannelGroup, ...], tuple[Frozen, ...], dict[int, tuple[str, int]]]:
    """Components that stand in the same axes, equally often, are the units of one group.

    Returns:
        The groups, what is frozen, and for every component that can go the name of its group and its place in it.
    """
    roles_of = channels.roles()
    axis_of = np.concatenate([np.full(axis.size, place) for place, axis in enumerate(channels.axes)])
    first_of = np.array([axis.first for axis in channels.axes])
    number = np.concatenate([axis.numbers for axis in channels.axes])
    order = np.lexsort((number, axis_of, component[number]))
    number, axis_of = number[order], axis_of[order]
    root = component[number]
    begins, counts = _runs(root, axis_of)  # of one axis in one component
    starts, axes = _runs(root[begins])  # of one component, in these
    members: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for begin, end in zip(starts.tolist(), (starts + axes).tolist(), strict=True):
        members[axis_of[begins[begin:end]].tobytes(), counts[begin:end].tobytes()].append(begin)
    groups: list[ChannelGroup] = []
    roots: list[np.ndarray] = []
    frozen: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for signature, found in members.items():
        places, repeats = (np.frombuffer(part, dtype=np.int64) for part in signature)
        units = begins[found]  # where each begins in ``number``
        roles = [roles_of[place] for place in places]
        why = [reasons.get(unit) for unit in root[units].tolist()]
        stuck = set(filter(None, why))
        kept = units[[reason is None for reason in why]]
        if kept.size and {"in", "out"} <= set(roles):
            kept = kept[np.argsort(number[kept])]
            whole = number[kept[:, None] + np.arange(repeats.sum())]  # [units, all their places]
            parts = np.split(whole, np.cumsum(repeats)[:-1], axis=1)
            slots = tuple(
                Slot(channels.axes[place].tensor, channels.axes[place].dim, role, part - first_of[place])
                for place, role, part in zip(places, roles, parts, strict=True)
            )
            made = next(slot for slot in slots if slot.role == "out")
            groups.append(ChannelGroup(made.tensor.rpartition(".")[0] or made.tensor, len(kept), slots))
            roots.append(root[kept])
        elif kept.size:
            stuck.add("nothing in the model reads it" if "out" in roles else "nothing in the model makes it")
        for reason in stuck:
            if "out" in roles or "in" in roles:
                frozen[reason].update(channels.axes[place][:2] for place in places)
    named = _named(groups)
    unit_of = {
        number: (group.name, unit)
        for group, numbers in zip(named, roots, strict=True)
        for unit, number in enumerate(numbers.tolist())
    }
    return named, tuple(Frozen(tuple(sorted(names)), reason) for reason, names in frozen.items()), unit_of


def _runs(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal rows begin, and how long they are."""
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    begins = np.flatnonzero(np.r_[columns[0].size > 0, changes])
    return begins, np.diff(np.r_[begins, columns[0].size])


def _named(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Groups whose channels one layer makes are told apart by a number."""
    taken: dict[str, int] = {}
    named = []
    for group in groups:
        taken[group.name] = number = taken.get(group.name, 0) + 1
        named.append(group if number == 1 else replace(group, name=f"{group.name}#{number}"))
    return tuple(named)


def _block_lists(model: nn.Module, steps: list[Step], component: np.ndarray) -> tuple[BlockList, ...]:
    """Runs of neighbours in a container that add to what they were given and return it in the same channels."""
    blocks: dict[str, Step] = {}
    for step in steps:
        holds_blocks = any(path.startswith(f"{step.path}.") for path in blocks)  # then those are a list of their own
        if step.ends and "." in step.path and not holds_blocks and _same_channels(step, component):
            blocks.setdefault(step.path, step)
    lists: list[list[Step]] = []
    for container in dict.fromkeys(path.rpartition(".")[0] for path in blocks):
        before = None
        for name, _ in model.get_submodule(container).named_children():
            block = blocks.get(f"{container}.{name}")
            if (
                block is not None
                and before is not None
                and _channels_of(block, component) == _channels_of(before, component)
            ):
                lists[-1].append(block)
            elif block is not None:
                lists.append([block])
            before = block
    return block_lists([(step.path, step.ends) for step in run] for run in lists)


def _channels_of(step: Step, component: np.ndarray) -> list[list[int]]:
    return [component[label].ravel().tolist() for label in step.into]


def _same_channels(step: Step, component: np.ndarray) -> bool:
    return len(step.into) == len(step.out) > 0 and all(
        one.shape == other.shape and (component[one] == component[other]).all()
        for one, other in zip(step.into, step.out, strict=True)
    )
