"""What is coupled to what in a model, as data: channel groups, block lists, and what is frozen and why."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from jdkd.errors import InputError

MULTIPLE = 8  # channels that groups keep, where they have more: a GPU gains nothing from other widths
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

    def rounded(self, units: float) -> int:
        """The nearest number of units, at least one, that makes a multiple of 8 channels where the group has that many.

        Where it has more channels and no number of its units makes one, units are rounded as they are.
        """
        step = MULTIPLE // math.gcd(MULTIPLE, self.size // self.units)
        step = 1 if step > self.units else step
        return max(step, int(units / step + 0.5) * step)

    def shrunk(self, share: float) -> int:
        """How many units stay of a share of them, :meth:`rounded`; groups of 8 channels and fewer stay whole."""
        return self.units if self.size <= MULTIPLE else min(self.units, self.rounded(share * self.units))

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

    def identities(self) -> Iterator[tuple[str, bool]]:
        """Yields every block and whether a copy of it can be born as the identity."""
        for path, ends in zip(self.blocks, self.ends, strict=True):
            yield path, bool(ends) and all(ends)

    @property
    def copied(self) -> int | None:
        """The last block whose copies can be born as the identity, by its place; None where there is none."""
        return max((place for place, (_, can) in enumerate(self.identities()) if can), default=None)

    @property
    def can_grow(self) -> bool:
        """Whether copies of some block can be born as the identity."""
        return self.copied is not None


def block_lists(runs: Iterable[Sequence[tuple[str, tuple[tuple[str, ...], ...]]]]) -> tuple[BlockList, ...]:
    """Lists of runs of blocks, each block with its path and its ends; named by the container if it holds no other."""
    runs = [run for run in runs if run]
    containers = [run[0][0].rpartition(".")[0] for run in runs]
    return tuple(
        BlockList(container if containers.count(container) == 1 else run[0][0], *map(tuple, zip(*run, strict=True)))
        for container, run in zip(containers, runs, strict=True)
    )


def without_blocks(lists: Iterable[BlockList], held: Container[str]) -> tuple[BlockList, ...]:
    """Lists without some blocks, which part them into runs on both sides."""
    runs: list[list[tuple[str, tuple[tuple[str, ...], ...]]]] = []
    for blocks in lists:
        runs.append([])
        for path, ends in zip(blocks.blocks, blocks.ends, strict=True):
            if path in held:
                runs.append([])
            else:
                runs[-1].append((path, ends))
    return block_lists(runs)


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
        held: blocks that are in no list, and why: without them the model is not what it is with nothing in their
            places; :func:`jdkd.rewrite.verify` finds them.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    block_lists: tuple[BlockList, ...]
    unknown: dict[str, tuple[str, ...]]
    unreached: tuple[str, ...]
    sizes: dict[str, int]
    followed: tuple[tuple[tuple[str, int] | None, ...], ...] = ()
    held: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ChannelGroup:
        """The channel group of a name.

        Raises:
            InputError: there is none.
        """
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            known = ", ".join(sorted(group.name for group in self.groups)[:5])
            raise InputError(
                f"there is no channel group {name!r} that can be cut; there are {known} and so on "
                f"({len(self.groups)}): see topology.groups."
            )
        return found

    def block_list(self, name: str) -> BlockList:
        """The block list of a name.

        Raises:
            InputError: there is none.
        """
        lists = {blocks.name: blocks for blocks in self.block_lists}
        if name not in lists:
            known = f"name one of {', '.join(lists)}" if lists else "it has none"
            raise InputError(f"{name!r} is no list of residual blocks in this model; {known}.")
        return lists[name]

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

        Blocks that are added or leave change the numbers of their neighbours, so what was found of a block, or of a
        group in it, holds of all that stand in its container and are called the same inside.

        Args:
            verified: of a model that this one was rewritten from.
        """
        containers = {blocks.container for each in (self, verified) for blocks in each.block_lists}

        def kin(name: str) -> str:
            """A name without the number of the block that it is in."""
            for container in containers:
                if name.startswith(f"{container}."):
                    return f"{container}.#.{name.removeprefix(f'{container}.').partition('.')[2]}"
            return name

        wrong = {
            (kin(name), dim): part.reason
            for part in verified.frozen
            if part.reason.startswith(DISAGREES)
            for name, dim in part.tensors
        }
        stiff = {kin(group.name) for group in verified.groups if not group.grows}
        lasting = {kin(path) for blocks in verified.block_lists for path, can in blocks.identities() if not can}
        groups, frozen = [], [*self.frozen]
        for group in self.groups:
            places = tuple((slot.tensor, slot.dim) for slot in group.slots)
            reason = next((wrong[kin(name), dim] for name, dim in places if (kin(name), dim) in wrong), None)
            if reason is None:
                groups.append(replace(group, grows=kin(group.name) not in stiff))
            else:
                frozen.append(Frozen(places, reason))
        lists = [
            replace(blocks, ends=tuple(
                ((),) if kin(path) in lasting else ends for path, ends in zip(blocks.blocks, blocks.ends, strict=True)
            ))
            for blocks in without_blocks(self.block_lists, verified.held)
        ]  # fmt: skip
        return replace(self, groups=tuple(groups), frozen=tuple(frozen), block_lists=tuple(lists), held=verified.held)

    def to_json(self) -> str:
        content = {
            "groups": [group.to_json() for group in self.groups],
            "frozen": [asdict(frozen) for frozen in self.frozen],
            "block_lists": [{"name": blocks.name, "blocks": blocks.blocks} for blocks in self.block_lists],
            "held": self.held,
            "unknown": self.unknown,
            "unreached": self.unreached,
            "prunable_share": self.prunable_share(),
        }
        return json.dumps(content, indent=2)
