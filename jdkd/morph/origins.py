"""Of which of a detector's parts those of a changed one are, and what they were called there."""

from __future__ import annotations

from torch import nn

from jdkd.graph import Topology
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Rewrite, arrange


def came_from(parent: nn.Module, rewrite: Rewrite, topology: Topology) -> dict[str, str]:
    """By the path of each of the child's modules, that of the parent's of which it is, or is a copy."""
    modules = dict(parent.named_modules())
    if not rewrite.blocks:
        return {path: path for path in modules}
    for path, module in modules.items():
        module._came_from = path
    try:
        arranged = arrange(parent, topology, rewrite.blocks)
    finally:
        for module in modules.values():
            del module._came_from
    return {path: module._came_from for path, module in arranged.named_modules()}


def names_before(model: nn.Module, topology: Topology, rewrite: Rewrite, grown: Topology) -> dict[str, str]:
    """What every group and block of a detector with more blocks, or with some moved, was called before.

    What is new has no name before, so it is not in it. It is born as the identity: its importance by gradients is 0,
    and it would be the first thing to be cut again, before any training can tell what it is worth.

    Args:
        model, topology: the detector before, and what was read off it.
        rewrite: adds or moves blocks, and does nothing else.
        grown: what was read off the detector afterwards.

    Returns:
        Names of groups and paths of blocks, by those that they have now.
    """
    origins = came_from(unwrapped(model), rewrite, topology)
    first = {origin: path for path, origin in reversed(origins.items())}
    blocks = (path for each in grown.block_lists for path in each.blocks)
    found = {}
    for name in (*(group.name for group in grown.groups), *blocks):
        path, mark, number = name.partition("#")
        if first[origins[path]] == path:
            found[name] = f"{origins[path]}{mark}{number}"
    return found
