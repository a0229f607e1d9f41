"""See :func:`verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.graph import BlockList, ChannelGroup, Frozen, Topology
from jdkd.graph.topology import DISAGREES
from jdkd.nn.exchange import as_elastic_block
from jdkd.rewrite.blocks import arrange, with_checked_ends
from jdkd.rewrite.channels import duplicate, mask, prune, widen
from jdkd.rewrite.comparison import difference, returned_by, said
from jdkd.rewrite.trial import Trial, comparable

Part = TypeVar("Part", ChannelGroup, BlockList)


def verify(model: nn.Module, topology: Topology, *example: Any, share: float = 0.5) -> Topology:
    """Cuts every group of a topology once, and compares with the model in which nothing reads what was cut.

    Both run on the example in evaluation mode, in float64 and with drawn weights where the model can; compared is
    whatever any module returns that kept its shape. All groups are cut together first, each to another share, and only
    if something disagrees is it looked for by halves. Then all are widened, which may change nothing, the last block
    of every list leaves, which must do what switching it off does, and every block is silenced, which must make it the
    identity.

    Args:
        model: the module that ``topology`` was read off.
        topology: what :func:`jdkd.graph.trace` found.
        *example: what it was traced with.
        share: of each group's units, how many go.

    Returns:
        The topology, with the groups that disagreed among the frozen ones, and the reason; with those that cannot grow
        marked, without the lists of containers that cannot do without a block, among the frozen too, and without the
        ends of blocks that cannot be born as the identity.
    """
    watched = [path for blocks in topology.block_lists for path in blocks.blocks]
    trial = comparable(model, example, watched)
    groups = [group for group in topology.groups if group.units > 1]
    wrong = _culprits(groups, lambda some: _cut_differs(trial, topology, some, share))
    frozen = [
        Frozen(tuple((slot.tensor, slot.dim) for slot in topology[name].slots), f"{DISAGREES}: {reason}")
        for name, reason in wrong.items()
    ]
    right = [group for group in topology.groups if group.name not in wrong]
    stiff = _culprits(right, lambda some: _growth_differs(trial, topology, some))
    needed = _culprits(topology.block_lists, lambda some: _drop_differs(trial, topology, some))
    containers = {blocks.container for blocks in topology.block_lists if blocks.name in needed}
    frozen += [Frozen((), f"the blocks of {name} stay as they are: {reason}") for name, reason in needed.items()]
    lists = [blocks for blocks in topology.block_lists if blocks.container not in containers]
    return replace(
        topology,
        groups=tuple(replace(group, grows=group.name not in stiff) for group in right),
        frozen=(*topology.frozen, *frozen),
        block_lists=with_checked_ends(trial.model, lists, trial.given),
    )


def _culprits(groups: Sequence[Part], difference: Callable[[Sequence[Part]], str | None]) -> dict[str, str]:
    """The groups, or lists, that make a difference, and which; they are looked for by halves."""
    reason = difference(groups) if groups else None
    if reason is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    half = len(groups) // 2
    found = _culprits(groups[:half], difference) | _culprits(groups[half:], difference)
    return found or {group.name: f"{reason}, together with its neighbours" for group in groups}


def _cut_differs(trial: Trial, topology: Topology, groups: Sequence[ChannelGroup], share: float) -> str | None:
    """What is different between cut and masked, or None."""
    keep = {group.name: _left(group, share, place) for place, group in enumerate(groups)}
    try:  # the smaller one is what is kept in memory
        got = returned_by(prune(trial.model, topology, keep), trial.example)
    except Exception as error:  # whatever a model's code makes of fewer channels
        return said(error)
    return difference(got, mask(trial.model, topology, keep), trial.example)


def _growth_differs(trial: Trial, topology: Topology, groups: Sequence[ChannelGroup]) -> str | None:
    """What changes when groups grow, or None."""
    try:
        grown = widen(trial.model, topology, {group.name: 1 for group in groups})
    except InputError as error:  # the places stand out of order
        return said(error)
    return difference(trial.returned, grown, trial.example)


def _drop_differs(trial: Trial, topology: Topology, lists: Sequence[BlockList]) -> str | None:
    """What is different between lists whose last block is switched off and those that have lost it, or None."""
    off = duplicate(trial.model)
    for blocks in lists:
        as_elastic_block(off.get_submodule(blocks.blocks[-1])).set_active(False)
    expected = returned_by(off, trial.example)
    without = arrange(trial.model, topology, {each.name: range(len(each.blocks) - 1) for each in lists})
    inside = tuple(f"{blocks.container}." for blocks in lists)  # where names have moved
    return difference(expected, without, trial.example, skip=inside, same_shapes=True)


def _left(group: ChannelGroup, share: float, seed: int) -> list[int]:
    """Units that stay: about ``1 - share`` of them, drawn; each group keeps another share, so that those which only
    fit while they are of one size are found."""
    generator = torch.Generator().manual_seed(seed)
    stays = (1 - share) * (0.75 + 0.5 * torch.rand((), generator=generator).item())
    count = min(max(1, round(stays * group.units)), group.units - 1)
    return torch.randperm(group.units, generator=generator)[:count].tolist()
