"""Student morphism: the actions on blocks and on the input that change a student and let it keep its weights.

The action space follows Joint-DetNAS (Yao et al., CVPR 2021, abstract and figure 2: morphism of the architecture and
removal of redundant parameters, with weight inheritance); channels are cut by :mod:`jdkd.morph.cutting`. Ranges are our
choice. An action is a pure function of the parent, any detector, and of its topology: it returns a :class:`Morph` and
changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from torch import nn

from jdkd.detect.input_size import input_size, size_attributes
from jdkd.detect.regions import region_attributes, region_count
from jdkd.errors import InputError
from jdkd.graph import BlockList, Topology
from jdkd.morph.importance import weakest_blocks
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite
from jdkd.rewrite.blocks import removable
from jdkd.rewrite.channels import require_traced

MAX_MOVE = 3  # blocks that go from one list to the next in one rearrangement


@dataclass(frozen=True)
class Morph:
    """One action, decided.

    Args:
        action: what is done, e.g. ``"remove a block of backbone.body.layer3"``.
        rewrite: the same, as data.
    """

    action: str
    rewrite: Rewrite

    def apply(self, parent: nn.Module, topology: Topology) -> nn.Module:
        """The child, with everything it inherits; ``topology`` is what the action was decided on."""
        return self.rewrite.apply(unwrapped(parent), topology)


def remove_block(model: nn.Module, topology: Topology, name: str) -> Morph:
    """Removes the weakest block of a list; a block that changes the stride or the channels is in none.

    Raises:
        InputError: there is no such list, or its container would be left without a child.
    """
    model, blocks = _of(model, topology), topology.block_list(name)
    if not removable(model, blocks):
        raise InputError(f"the only block of {name} stays, as nothing else is in {blocks.container}; remove another.")
    return Morph(f"remove a block of {name}", Rewrite(blocks={name: _without(model, blocks, 1)}))


def add_block(model: nn.Module, topology: Topology, name: str) -> Morph:
    """Repeats the last block of a list that can be born as the identity, as wide inside as that.

    Raises:
        InputError: there is no such list, or none of its blocks can be born as the identity.
    """
    _of(model, topology)
    return Morph(f"add a block to {name}", Rewrite(blocks={name: _with(topology.block_list(name), 1)}))


def rearrange(model: nn.Module, topology: Topology, source: str, target: str, count: int = 1) -> Morph:
    """Moves blocks between two lists that run one after the other: one loses some, the other gains identities.

    The blocks that leave are the weakest of their list. Those that arrive run at another width and stride, where the
    old weights mean nothing, so they are born as the identity.

    Raises:
        InputError: there are no such lists, or they are not neighbours, or have no block to give or to repeat.
    """
    model, losing, gaining = _of(model, topology), topology.block_list(source), topology.block_list(target)
    order = [blocks.name for blocks in topology.block_lists]
    room = min(MAX_MOVE, removable(model, losing))
    if abs(order.index(source) - order.index(target)) != 1 or not 1 <= count <= room:
        raise InputError(
            f"cannot move {count} block(s) from {source} to {target}: lists must be neighbours, of {', '.join(order)}, "
            f"and {source} gives 1..{room} blocks (at most {MAX_MOVE} move, and its container keeps a child)."
        )
    moved = {source: _without(model, losing, count), target: _with(gaining, count)}
    return Morph(f"move {count} block(s) from {source} to {target}", Rewrite(blocks=moved))


def change_resolution(model: nn.Module, min_size: int) -> Morph:
    """Another short side of the input, in pixels; the long side's limit scales with it.

    Raises:
        InputError: the detector does not resize its input, or to one fixed size.
    """
    model = unwrapped(model)
    now, attributes = cast(tuple[int, int], input_size(model)), size_attributes(model, min_size)
    return Morph(f"input {now[0]} -> {min_size} px", Rewrite(attributes=attributes))


def change_regions(model: nn.Module, count: int) -> Morph:
    """Another number of regions that a two-stage detector proposes in evaluation.

    Raises:
        InputError: the detector has no :func:`jdkd.detect.regions.region_count`, or ``count`` is no positive whole
            number.
    """
    attributes = region_attributes(model, count)
    return Morph(f"regions {region_count(model)} -> {count}", Rewrite(attributes=attributes))


def shorten(
    model: nn.Module,
    topology: Topology,
    shorter: Sequence[str] = (),
    min_size: int | None = None,
    regions: int | None = None,
) -> Morph:
    """Removes the weakest block of each of some lists, and changes input size and regions, as one action.

    Args:
        model: the detector to change.
        topology: of it.
        shorter: names of the lists.
        min_size: short side of the input in pixels; by default it stays.
        regions: how many are proposed in evaluation; by default as many as now.

    Raises:
        InputError: as of :func:`remove_block`, :func:`change_resolution` and :func:`change_regions`, or a list is named
            twice.
    """
    if isinstance(shorter, str) or len(set(shorter)) < len(shorter):
        raise InputError(f"shorter is {shorter!r}; give a list of lists of blocks, each once, as each loses one block.")
    morphs = [remove_block(model, topology, name) for name in shorter]
    morphs += [change_resolution(model, min_size)] if min_size is not None else []
    morphs += [change_regions(model, regions)] if regions is not None else []
    blocks = {name: order for morph in morphs for name, order in morph.rewrite.blocks.items()}
    attributes = {name: value for morph in morphs for name, value in morph.rewrite.attributes.items()}
    return Morph("; ".join(morph.action for morph in morphs), Rewrite(blocks=blocks, attributes=attributes))


def can_shorten(model: nn.Module, topology: Topology) -> list[str]:
    """Names of the lists of blocks that can lose one."""
    return [blocks.name for blocks in topology.block_lists if removable(unwrapped(model), blocks)]


def grow(model: nn.Module, topology: Topology, rng: random.Random, *, max_depth: int) -> Morph:
    """Adds a block to a list, or moves blocks to a neighbouring one, as chance has it.

    Args:
        model: the detector to change.
        topology: of it.
        rng: the source of chance.
        max_depth: no list of blocks grows beyond so many.

    Raises:
        InputError: no list of blocks can grow.
    """
    model = _of(model, topology)
    lists = topology.block_lists
    roomy = [blocks for blocks in lists if len(blocks.blocks) < max_depth and blocks.can_grow]
    neighbours = [pair for one, other in pairwise(lists) for pair in ((one, other), (other, one))]
    moves = [(source, target) for source, target in neighbours if removable(model, source) and target in roomy]
    if not roomy:
        raise InputError(
            f"none of the {len(lists)} lists of blocks of this {type(model).__name__} can grow within {max_depth} "
            "blocks; allow more depth."
        )
    if rng.choice(["add", "move"] if moves else ["add"]) == "add":
        return add_block(model, topology, rng.choice(roomy).name)
    source, target = rng.choice(moves)
    room = min(MAX_MOVE, removable(model, source), max_depth - len(target.blocks))
    return rearrange(model, topology, source.name, target.name, rng.randint(1, room))


def _of(model: nn.Module, topology: Topology) -> nn.Module:
    """The model inside torch's wrappers.

    Raises:
        InputError: the topology was read off another.
    """
    model = unwrapped(model)
    require_traced(model, topology)
    return model


def _without(model: nn.Module, blocks: BlockList, count: int) -> tuple[int, ...]:
    """Blocks that stay when the ``count`` weakest leave."""
    gone = weakest_blocks(model, blocks, count)
    return tuple(place for place in range(len(blocks.blocks)) if place not in gone)


def _with(blocks: BlockList, count: int) -> tuple[int, ...]:
    """Blocks, and ``count`` times the one that is copied."""
    if not blocks.can_grow:
        raise InputError(f"{blocks.name} stays as deep as it is: its blocks cannot be born as the identity.")
    return (*range(len(blocks.blocks)), *[blocks.copied] * count)
