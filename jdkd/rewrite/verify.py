"""See :func:`verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from jdkd.errors import InputError, said
from jdkd.graph import ChannelGroup, Frozen, Topology
from jdkd.graph.topology import DISAGREES
from jdkd.rewrite.block_lists import with_tried_blocks
from jdkd.rewrite.channels import mask, prune, widen
from jdkd.rewrite.comparison import culprits, difference, returned_by
from jdkd.rewrite.trial import Trial, comparable

REMEDY = "look in the model's code for numbers or places of channels, and for tensors that are no part of it"


def verify(model: nn.Module, topology: Topology, *example: Any) -> Topology:
    """Cuts every group of a topology once, and compares with the model in which nothing reads what was cut.

    Both run on the example in evaluation mode, in float64 and with drawn weights where the model can; compared is
    whatever any module returns that kept its shape. All groups are cut together first, each to another share, and only
    if something disagrees is it looked for by halves. Then all are widened, which may change nothing. Where blocks
    leave it must be as if nothing happened at their places; silenced they are the identity, and copies change nothing.

    Args:
        model: the module that ``topology`` was read off.
        topology: what :func:`jdkd.graph.trace` found.
        *example: what it was traced with.

    Returns:
        The topology, with the groups that disagreed among the frozen ones, and the reason; with those that cannot grow
        marked; with the blocks that cannot leave in ``held`` and in no list, and without the ends of those that cannot
        be born as the identity.
    """
    watched = [path for blocks in topology.block_lists for path in blocks.blocks]
    trial = comparable(model, example, watched)
    names = [group.name for group in topology.groups if group.units > 1]
    wrong = culprits(names, lambda some: _cut_differs(trial, topology, some))
    frozen = [
        Frozen(tuple((slot.tensor, slot.dim) for slot in topology[name].slots), f"{DISAGREES}: {reason}; {REMEDY}")
        for name, reason in wrong.items()
    ]
    right = [group for group in topology.groups if group.name not in wrong]
    stiff = culprits([group.name for group in right], lambda some: _growth_differs(trial, topology, some))
    return replace(
        with_tried_blocks(trial, topology),
        groups=tuple(replace(group, grows=group.name not in stiff) for group in right),
        frozen=(*topology.frozen, *frozen),
    )


def _cut_differs(trial: Trial, topology: Topology, names: Sequence[str]) -> str | None:
    """What is different between cut and masked, or None."""
    keep = {name: _left(topology[name], place) for place, name in enumerate(names)}
    try:  # the smaller one is what is kept in memory
        got = returned_by(prune(trial.model, topology, keep), trial.example)
    except Exception as error:  # whatever a model's code makes of fewer channels
        return said(error)
    return difference(got, mask(trial.model, topology, keep), trial.example)


def _growth_differs(trial: Trial, topology: Topology, names: Sequence[str]) -> str | None:
    """What changes when groups grow, or None."""
    try:
        grown = widen(trial.model, topology, dict.fromkeys(names, 1))
    except InputError as error:  # the places stand out of order
        return said(error)
    return difference(trial.returned, grown, trial.example)


def _left(group: ChannelGroup, seed: int) -> list[int]:
    """Units that stay: about half of them, drawn; each group keeps another share, so that those which only fit while
    they are of one size are found."""
    generator = torch.Generator().manual_seed(seed)
    stays = 0.375 + 0.25 * torch.rand((), generator=generator).item()
    count = min(max(1, round(stays * group.units)), group.units - 1)
    return torch.randperm(group.units, generator=generator)[:count].tolist()
