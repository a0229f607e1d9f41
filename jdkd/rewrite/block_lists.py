"""Which residual blocks may leave and which may be repeated: tried, as code may call them by their place or name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from jdkd.errors import said
from jdkd.graph import Topology
from jdkd.graph.topology import without_blocks
from jdkd.rewrite.blocks import arrange, with_checked_ends
from jdkd.rewrite.channels import duplicate
from jdkd.rewrite.comparison import culprits, difference, returned_by
from jdkd.rewrite.trial import Trial


class Passing(nn.Module):
    """Stands where a block stood, and returns what it is given."""

    def forward(self, given: Any, *others: Any, **named: Any) -> Any:
        return given


def with_tried_blocks(trial: Trial, topology: Topology) -> Topology:
    """A topology whose lists hold only blocks that may leave, and only ends of blocks that may be repeated.

    A model without some of its blocks is compared with one in which nothing happens at their places; one with copies
    that are born as identities is compared with itself.

    Args:
        trial: of the model, with what every block was given.
        topology: what was traced; why a block stays is added to what is ``held``.
    """
    every = [path for blocks in topology.block_lists for path in blocks.blocks]
    held = culprits(every, lambda some: _leaving_differs(trial, topology, some))
    lists = with_checked_ends(trial.model, without_blocks(topology.block_lists, held), trial.given)
    topology = replace(topology, block_lists=lists, held={**topology.held, **held})
    growing = [blocks.name for blocks in lists if blocks.can_grow]
    stiff = culprits(growing, lambda some: _repeating_differs(trial, topology, some))
    return replace(
        topology,
        block_lists=tuple(
            replace(blocks, ends=(((),),) * len(blocks.blocks)) if blocks.name in stiff else blocks for blocks in lists
        ),
    )


def _leaving_differs(trial: Trial, topology: Topology, paths: Sequence[str]) -> str | None:
    """What is different between a model without some blocks and one in which they do nothing, or None."""
    order = {
        blocks.name: [place for place, path in enumerate(blocks.blocks) if path not in paths]
        for blocks in topology.block_lists
        if not set(paths).isdisjoint(blocks.blocks)
    }
    try:
        got = returned_by(arrange(trial.model, topology, order), trial.example, inside=False)
    except Exception as error:  # whatever a model's code makes of fewer blocks
        return said(error)
    passing = duplicate(trial.model)
    for path in paths:
        owner, _, name = path.rpartition(".")
        passing.get_submodule(owner)._modules[name] = Passing()
    return difference(got, passing, trial.example, inside=False)


def _repeating_differs(trial: Trial, topology: Topology, names: Sequence[str]) -> str | None:
    """What changes when a block of some lists is repeated, or None."""
    order = {
        blocks.name: [*range(len(blocks.blocks)), blocks.copied]
        for blocks in topology.block_lists
        if blocks.name in names
    }
    return difference(trial.returned, arrange(trial.model, topology, order), trial.example, inside=False)
