"""What a child takes over from its parent: the weights that rewrites leave, repaired and recalibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from jdkd.detect.architecture import architecture_of
from jdkd.graph import Topology
from jdkd.morph import repair
from jdkd.rewrite import Rewrite, build
from jdkd.search.context import SearchContext
from jdkd.train import calibrate_bn


@dataclass(frozen=True)
class Child:
    """A detector after rewrites.

    Args:
        model: in evaluation mode.
        kept: for every level of its pyramid, the parent's channel opposite each of its own.
    """

    model: nn.Module
    kept: tuple[tuple[int, ...], ...]


def inherit(parent: nn.Module, topology: Topology, rewrites: Sequence[Rewrite], context: SearchContext) -> Child:
    """The child of a detector, with everything that it takes over.

    After each cut the weights that read what was cut are repaired (:func:`jdkd.morph.repair`), and in the end batch
    norms are recalibrated, all on the probe: training goes on from there. Without a rewrite the child is the parent, as
    it is.

    Args:
        parent: stays as it is.
        topology: of the parent.
        rewrites: one after the other, each of what the one before has left.
        context: has the probe.
    """
    child, kept = parent, tuple(tuple(range(len(level))) for level in topology.followed)
    for place, rewrite in enumerate(rewrites, start=1):
        before, child = child, rewrite.apply(child, topology)
        if rewrite.keep:
            repair(child, before, rewrite, topology, context.probe())
        left = [rewrite.surviving(level) for level in topology.followed]
        kept = tuple(tuple(level[channel] for channel in own) for level, own in zip(kept, left, strict=True))
        if place < len(rewrites):
            topology = rewrite.foreseen(topology, child) or context.read(child)
    if rewrites:
        calibrate_bn(child, context.probe())
    return Child(child, kept)


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with weights that know nothing, for a search without inheritance."""
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = build(architecture_of(model, "search"))
    return made.to(device)
