"""Student morphism: the five actions that change a student and let it keep its weights.

The action space follows Joint-DetNAS (Yao et al., CVPR 2021, abstract and figure 2: morphism of the architecture and
removal of redundant parameters, with weight inheritance). Ranges and least shares are our choice. An action is a
pure function of the parent, any detector, and of its topology: it returns a :class:`Morph` and changes nothing.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from jdkd.detect.input_size import input_size, size_attributes
from jdkd.errors import InputError
from jdkd.graph import BlockList, Topology
from jdkd.graph.topology import MULTIPLE
from jdkd.morph.importance import gamma_importance, magnitude_importance, strongest, weakest_blocks
from jdkd.morph.parts import STREAMS, slimmed
from jdkd.morph.parts import parts as parts_of
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite
from jdkd.rewrite.channels import require_traced

FLOOR = 0.25  # no group loses more than the rest in one action
MAX_MOVE = 3  # blocks that go from one list to the next in one rearrangement
SHARES = (0.0, 0.25, 0.5)  # of a part, dropped in one action
MOST_PARTS = 2  # that one action cuts
KINDS = "prune", "prune", "remove", "add", "rearrange", "resolution"
GROWING = "add", "rearrange"  # kinds of actions by which a list of blocks grows
STREAMS_CHANCE = 0.1  # that an action cuts the residual streams, the least share of them, instead of a part


@dataclass(frozen=True)
class Morph:
    """One action, decided.

    Args:
        action: what is done, e.g. ``"prune 20% inner channels"``.
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
    if not _removable(model, blocks):
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
    room = min(MAX_MOVE, _removable(model, losing))
    if abs(order.index(source) - order.index(target)) != 1 or not 1 <= count <= room:
        raise InputError(
            f"cannot move {count} block(s) from {source} to {target}: lists must be neighbours, of {', '.join(order)}, "
            f"and {source} gives 1..{room} blocks (at most {MAX_MOVE} move, and its container keeps a child)."
        )
    moved = {source: _without(model, losing, count), target: _with(gaining, count)}
    return Morph(f"move {count} block(s) from {source} to {target}", Rewrite(blocks=moved))


def prune_channels(
    model: nn.Module,
    topology: Topology,
    ratio: float,
    parts: Mapping[str, float] | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> Morph:
    """Drops the least important inner channels of the whole detector, and of parts of others.

    Args:
        model: the detector.
        topology: of it.
        ratio: share of all inner channels that pass a norm to drop, 0 to below 1. Every group is rounded, see
            :meth:`ChannelGroup.shrunk`, and keeps at least :data:`FLOOR` of its channels.
        parts: share of each group of a part to drop; see :func:`jdkd.morph.parts`.
        importance: of every unit of every group, see :func:`jdkd.morph.channel_importance`; by default |gamma| inside
            (network slimming), and magnitude in parts.

    Raises:
        InputError: a share is outside 0 to below 1, there is no such part, or the rounding leaves nothing to drop.
    """
    asked = {name: share for name, share in {"inner": ratio, **(parts or {})}.items() if share}
    model, known = _of(model, topology), parts_of(topology)
    for name, share in asked.items():
        if not 0 <= share < 1:
            raise InputError(f"{name} is the share of channels to drop and must be in [0, 1), got {share}.")
        if name not in known and name != "inner":
            raise InputError(f"{name!r} is no part of the detector; its parts are {', '.join(known)}.")
    keep = _slimmed(model, topology, ratio, importance) if ratio else {}
    for name, share in asked.items():
        for group in [topology[each] for each in known.get(name, ())]:
            count = group.shrunk(max(1 - share, FLOOR))
            if count < group.units:
                values = importance[group.name] if importance else magnitude_importance(model, group)
                keep[group.name] = strongest(values, count)
    if not keep:
        raise InputError(
            f"dropping {_listed(asked) or 'nothing'} changes nothing after rounding to multiples of {MULTIPLE} "
            "channels; drop more."
        )
    return Morph(f"prune {_listed(asked)} channels", Rewrite(keep=keep))


def change_resolution(model: nn.Module, min_size: int) -> Morph:
    """Another short side of the input, in pixels; the long side's limit scales with it.

    Raises:
        InputError: the detector does not resize its input, or to one fixed size.
    """
    model = unwrapped(model)
    now, attributes = input_size(model), size_attributes(model, min_size)
    return Morph(f"input {now[0]} -> {min_size} px", Rewrite(attributes=attributes))


def shortened(model: nn.Module, topology: Topology) -> list[str]:
    """Lists of blocks that can lose one."""
    return [blocks.name for blocks in topology.block_lists if _removable(unwrapped(model), blocks)]


def draw(
    model: nn.Module,
    topology: Topology,
    rng: random.Random,
    resolutions: Sequence[int] = (),
    *,
    max_depth: int,
    kinds: Sequence[str] = KINDS,
    importance: Mapping[str, Tensor] | None = None,
) -> Morph:
    """One action, drawn at random among those that the detector allows.

    Args:
        model: the detector to change.
        topology: of it.
        rng: the source of chance.
        resolutions: short sides that may be chosen, in pixels.
        max_depth: no list of blocks grows beyond so many.
        kinds: of actions, those that are named more often are drawn more often.
        importance: what channels are pruned by, see :func:`prune_channels`.

    Raises:
        InputError: nothing is left to do.
    """
    model = _of(model, topology)
    lists = topology.block_lists
    deep = [blocks for blocks in lists if _removable(model, blocks)]
    roomy = [blocks for blocks in lists if len(blocks.blocks) < max_depth and blocks.can_grow]
    moves = [pair for one, other in pairwise(lists) for pair in ((one, other), (other, one))]
    moves = [(source, target) for source, target in moves if source in deep and target in roomy]
    now = input_size(model)
    sizes = [size for size in resolutions if now is not None and size != now[0]]
    for _ in range(100):
        kind = rng.choice(kinds)
        if kind == "prune":
            with contextlib.suppress(InputError):  # nothing left to drop after rounding: draw again
                ratio = rng.choice((0.0, rng.uniform(0.1, 0.3))) if slimmed(topology) else 0.0
                return prune_channels(model, topology, ratio, _drawn(topology, rng), importance)
        elif kind == "remove" and deep:
            return remove_block(model, topology, rng.choice(deep).name)
        elif kind == "add" and roomy:
            return add_block(model, topology, rng.choice(roomy).name)
        elif kind == "rearrange" and moves:
            source, target = rng.choice(moves)
            room = min(MAX_MOVE, _removable(model, source), max_depth - len(target.blocks))
            return rearrange(model, topology, source.name, target.name, rng.randint(1, room))
        elif kind == "resolution" and sizes:
            return change_resolution(model, rng.choice(sizes))
    raise InputError(
        f"no action is left for this {type(model).__name__} of {len(topology.groups)} channel groups and {len(lists)} "
        "lists of blocks; allow more depth or more input sizes."
    )


def _drawn(topology: Topology, rng: random.Random) -> dict[str, float]:
    """A share for some parts."""
    known = parts_of(topology)
    if STREAMS in known and rng.random() < STREAMS_CHANCE:
        return {STREAMS: min(filter(None, SHARES))}
    others = [name for name in known if name != STREAMS]
    return {name: rng.choice(SHARES) for name in rng.sample(others, min(MOST_PARTS, len(others)))}


def _of(model: nn.Module, topology: Topology) -> nn.Module:
    """The model inside torch's wrappers.

    Raises:
        InputError: the topology was read off another.
    """
    model = unwrapped(model)
    require_traced(model, topology)
    return model


def _removable(model: nn.Module, blocks: BlockList) -> int:
    """How many blocks of a list may leave: all, but for the last child of their container."""
    others = len(model.get_submodule(blocks.container)._modules) - len(blocks.blocks)
    return len(blocks.blocks) - (others == 0)


def _without(model: nn.Module, blocks: BlockList, count: int) -> tuple[int, ...]:
    """Blocks that stay when the ``count`` weakest leave."""
    gone = weakest_blocks(model, blocks, count)
    return tuple(place for place in range(len(blocks.blocks)) if place not in gone)


def _with(blocks: BlockList, count: int) -> tuple[int, ...]:
    """Blocks, and ``count`` times the one that is copied."""
    if not blocks.can_grow:
        raise InputError(f"{blocks.name} stays as deep as it is: its blocks cannot be born as the identity.")
    return (*range(len(blocks.blocks)), *[blocks.copied] * count)


def _slimmed(
    model: nn.Module, topology: Topology, ratio: float, given: Mapping[str, Tensor] | None
) -> dict[str, Sequence[int]]:
    groups = slimmed(topology)
    if not groups:
        raise InputError(f"ratio {ratio} is of inner channels that pass a norm, and there are none; name parts to cut.")
    importance = [given[group.name] if given else gamma_importance(model, topology, group) for group in groups]
    everything = torch.cat(
        [values.repeat_interleave(group.size // group.units) for group, values in zip(groups, importance, strict=True)]
    )
    threshold = everything.kthvalue(max(1, min(len(everything), round(ratio * len(everything))))).values
    keep = {}
    for group, values in zip(groups, importance, strict=True):
        count = group.shrunk(max(float((values > threshold).sum()) / group.units, FLOOR))
        if count < group.units:
            keep[group.name] = strongest(values, count)
    return keep


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
