"""What is coupled to what in a model, as data: channel groups, block lists, and what is frozen and why."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

DISAGREES = "cut and masked disagree"  # how the reason begins where :func:`jdkd.rewrite.verify` froze a group


@dataclass(frozen=True)
class Slot:
    """Where the channels of a group stand in one dimension of one tensor.

    Args:
        tensor: name of a parameter or buffer.
        dim: which of its dimensions.
        role: ``"out"`` (a product makes them here), ``"in"`` (a product reads them) or ``"scale"`` (elementwise).
        places: ``[units, repeat]``, the positions of each unit along the dimension.
    """

    tensor: str
    dim: int
    role: str
    places: np.ndarray

    @property
    def repeat(self) -> int:
        """Positions that one unit takes: 49 where a map of 7x7 was flattened."""
        return self.places.shape[1]

    @property
    def offset(self) -> int | None:
        """First position, where the units stand one after the other without a gap; else None."""
        first = int(self.places[0, 0])
        return first if (self.places.ravel() == np.arange(first, first + self.places.size)).all() else None

    def to_json(self) -> dict[str, Any]:
        offset = self.offset
        where = {"offset": offset, "repeat": self.repeat} if offset is not None else {"places": self.places.tolist()}
        return {"tensor": self.tensor, "dim": self.dim, "role": self.role, **where}


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are cut in the same tensors; unit k stands at the places k of every slot.

    A unit is the least that can go: one channel, or several where a group norm or a grouped convolution binds them.

    Args:
        name: the first layer that makes the channels.
        units: how many units there are.
        slots: every place where they stand.
        grows: whether units can be added; :func:`jdkd.rewrite.verify` finds where code holds on to places.
    """

    name: str
    units: int
    slots: tuple[Slot, ...]
    grows: bool = True

    @property
    def makers(self) -> tuple[str, ...]:
        """Paths of the layers that make the channels; a residual stream has one for each of its sums."""
        layers = (slot.tensor.rpartition(".")[0] for slot in self.slots if slot.role == "out")
        return tuple(dict.fromkeys(layers))

    @property
    def size(self) -> int:
        """Channels, as the layer that names the group counts them."""
        return self.units * next(slot for slot in self.slots if slot.role == "out").repeat

    def to_json(self) -> dict[str, Any]:
        slots = [slot.to_json() for slot in self.slots]
        return {"name": self.name, "units": self.units, "grows": self.grows, "slots": slots}


@dataclass(frozen=True)
class Frozen:
    """Channels that keep their number.

    Args:
        tensors: (tensor, dimension) of all places where they stand.
        reason: which operator, in which module, keeps them.
    """

    tensors: tuple[tuple[str, int], ...]
    reason: str


@dataclass(frozen=True)
class BlockList:
    """A run of residual blocks that keep their input's shape: each may be dropped, moved, or joined by others.

    Args:
        name: path of the container; where it holds several runs, of the first block.
        blocks: paths of the blocks, in order.
        ends: for each block and each sum in it, the layers and parameters that made what is added to its input, the
            nearest first (those that are added with a ``+`` before their name); with these at 0 it is the identity.
    """

    name: str
    blocks: tuple[str, ...]
    ends: tuple[tuple[tuple[str, ...], ...], ...]

    @property
    def container(self) -> str:
        """Path of the module whose children they are."""
        return self.blocks[0].rpartition(".")[0]


@dataclass(frozen=True)
class Topology:
    """What :func:`jdkd.graph.trace` read off a model.

    Args:
        groups: what can be cut.
        frozen: what cannot, and why.
        block_lists: what can be dropped.
        unknown: operators without a rule, and the modules that ran them.
        unreached: parameters that the example did not reach.
        sizes: elements of every parameter, by name.
        followed: for every feature map that the followed module returned, what each of its channels is: the name of its
            group and the unit in it, or None where it cannot go.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    block_lists: tuple[BlockList, ...]
    unknown: dict[str, tuple[str, ...]]
    unreached: tuple[str, ...]
    sizes: dict[str, int]
    followed: tuple[tuple[tuple[str, int] | None, ...], ...] = ()

    def __getitem__(self, name: str) -> ChannelGroup:
        return next(group for group in self.groups if group.name == name)

    def prunable_share(self) -> float:
        """The share of all parameters that stand in a slot of some group."""
        reached = {slot.tensor for group in self.groups for slot in group.slots}
        return sum(self.sizes.get(name, 0) for name in reached) / max(1, sum(self.sizes.values()))

    def norms(self, group: ChannelGroup) -> tuple[str, ...]:
        """Paths of the normalisation layers that scale and shift each channel of a group by itself."""
        standing = {slot.tensor for slot in group.slots}
        return tuple(
            layer
            for slot in group.slots
            for layer, _, leaf in [slot.tensor.rpartition(".")]
            if slot.role == "scale"
            and leaf == "weight"
            and f"{layer}.bias" in standing
            and self.sizes.get(slot.tensor, slot.places.size) == slot.places.size
        )

    @cached_property
    def reading(self) -> frozenset[str]:
        """Paths of the layers that read channels; those that read the image do not."""
        places = [(slot.tensor, slot.dim) for group in self.groups for slot in group.slots]
        everywhere = (places, *(frozen.tensors for frozen in self.frozen))
        return frozenset(name.rpartition(".")[0] for each in everywhere for name, dim in each if dim)

    def is_stream(self, group: ChannelGroup) -> bool:
        """Whether residual blocks add to a group's channels, which then stand both inside and outside of the blocks."""
        for blocks in self.block_lists:
            for path in blocks.blocks:
                inside = [slot.tensor.startswith(f"{path}.") for slot in group.slots]
                if any(inside) and not all(inside):
                    return True
        return False

    @cached_property
    def inner(self) -> tuple[ChannelGroup, ...]:
        """Groups that stay inside one residual block, and those that one layer makes and that pass a norm.

        Depthwise convolutions, which make of every channel one, do not count as makers, nor do layers that gate the
        channels by what they read of themselves (squeeze-and-excitation), nor does what reads the image.
        """
        blocks = [f"{path}." for each in self.block_lists for path in each.blocks]
        read_by: dict[str, set[str]] = defaultdict(set)  # layer -> groups that it reads
        for group in self.groups:
            for slot in group.slots:
                if slot.role == "in":
                    read_by[slot.tensor.rpartition(".")[0]].add(group.name)
        groups = {group.name: group for group in self.groups}

        def gates(layer: str, gated: ChannelGroup) -> bool:
            makers = [maker for name in read_by[layer] for maker in groups[name].makers]
            return bool(makers) and all(read_by[maker] == {gated.name} for maker in makers)

        def is_inner(group: ChannelGroup) -> bool:
            if any(all(slot.tensor.startswith(block) for slot in group.slots) for block in blocks):
                return True
            makers = [layer for layer in group.makers if layer in self.reading and not gates(layer, group)]
            return len(makers) == 1 and bool(self.norms(group)) and not self.is_stream(group)

        return tuple(filter(is_inner, self.groups))

    def trusting(self, verified: Topology) -> Topology:
        """What was found out of another state of the model, by :func:`jdkd.rewrite.verify`, holds of this one too.

        Blocks that are added or leave change the numbers in names, so what was found of a group or of a block holds of
        all whose names differ in numbers alone.

        Args:
            verified: of a model that this one was rewritten from.
        """
        wrong = {
            _kin(name) for part in verified.frozen if part.reason.startswith(DISAGREES) for name, _ in part.tensors
        }
        stiff = {_kin(group.name) for group in verified.groups if not group.grows}
        ends = {
            _kin(path): bool(made and all(made))
            for blocks in verified.block_lists
            for path, made in zip(blocks.blocks, blocks.ends, strict=True)
        }
        listed = {blocks.container for blocks in verified.block_lists}
        needed = {  # containers that were there, and whose blocks may not leave
            blocks.container
            for blocks in self.block_lists
            if blocks.container not in listed
            and any(name.startswith(f"{blocks.container}.") for name in verified.sizes)
        }
        return replace(
            self,
            groups=tuple(
                replace(group, grows=_kin(group.name) not in stiff)
                for group in self.groups
                if not any((_kin(slot.tensor), slot.dim) in wrong for slot in group.slots)
            ),
            block_lists=tuple(
                replace(
                    blocks,
                    ends=tuple(
                        made if ends.get(_kin(path), True) else ((),)
                        for path, made in zip(blocks.blocks, blocks.ends, strict=True)
                    ),
                )
                for blocks in self.block_lists
                if blocks.container not in needed
            ),
        )

    def to_json(self) -> str:
        content = {
            "groups": [group.to_json() for group in self.groups],
            "frozen": [asdict(frozen) for frozen in self.frozen],
            "block_lists": [{"name": blocks.name, "blocks": blocks.blocks} for blocks in self.block_lists],
            "unknown": self.unknown,
            "unreached": self.unreached,
            "prunable_share": self.prunable_share(),
        }
        return json.dumps(content, indent=2)


def _kin(name: str) -> str:
    """A name without its numbers, and without the mark of copies."""
    return re.sub(r"\d+(\+\d+)?", "#", name)
