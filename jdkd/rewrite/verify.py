"""See :func:`verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jdkd.graph import BlockList, ChannelGroup, Frozen, Topology
from jdkd.graph.topology import DISAGREES
from jdkd.nn.exchange import as_elastic_block
from jdkd.rewrite.blocks import arrange, with_checked_ends
from jdkd.rewrite.channels import duplicate, mask, prune, widen
from jdkd.rewrite.trial import comparable, returned_by

Part = TypeVar("Part", ChannelGroup, BlockList)
TOLERANCE = 1e-4  # largest difference over the largest value


def verify(model: nn.Module, topology: Topology, *example: Any, share: float = 0.5) -> Topology:
    """Cuts every group of a topology once, and compares with the model in which nothing reads what was cut.

    Both run on the example in evaluation mode, in float64 and with drawn weights where the model can; compared is
    whatever any module returns that kept its shape. All groups are cut together first, each to another share, and only
    if something disagrees is it looked for by halves. Then all are widened, which may change nothing, the last block of
    every list leaves, which must do what switching it off does, and every block is silenced, which must make it the
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
    exact, example, expected = comparable(model, example)
    groups = [group for group in topology.groups if group.units > 1]
    wrong = _culprits(groups, lambda some: _cut_differs(exact, topology, some, example, share))
    frozen = [
        Frozen(tuple((slot.tensor, slot.dim) for slot in topology[name].slots), f"{DISAGREES}: {reason}")
        for name, reason in wrong.items()
    ]
    right = [group for group in topology.groups if group.name not in wrong]
    stiff = _culprits(right, lambda some: _growth_differs(exact, topology, some, example, expected))
    needed = _culprits(topology.block_lists, lambda some: _drop_differs(exact, topology, some, example))
    containers = {blocks.container for blocks in topology.block_lists if blocks.name in needed}
    frozen += [Frozen((), f"the blocks of {name} stay as they are: {reason}") for name, reason in needed.items()]
    lists = [blocks for blocks in topology.block_lists if blocks.container not in containers]
    return replace(
        topology,
        groups=tuple(replace(group, grows=group.name not in stiff) for group in right),
        frozen=(*topology.frozen, *frozen),
        block_lists=with_checked_ends(exact, lists, example),
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


def _cut_differs(
    model: nn.Module, topology: Topology, groups: Sequence[ChannelGroup], example: tuple[Any, ...], share: float
) -> str | None:
    """What is different between cut and masked, or None."""
    keep = {group.name: _left(group, share, place) for place, group in enumerate(groups)}
    expected = returned_by(mask(model, topology, keep), example)
    try:
        got = returned_by(prune(model, topology, keep), example)
    except Exception as error:  # whatever a model's code makes of fewer channels
        return _said(error)
    return _difference(expected, got)


def _growth_differs(
    model: nn.Module,
    topology: Topology,
    groups: Sequence[ChannelGroup],
    example: tuple[Any, ...],
    expected: dict[str, list[Tensor]],
) -> str | None:
    """What changes when groups grow, or None."""
    try:
        return _difference(expected, returned_by(widen(model, topology, {group.name: 1 for group in groups}), example))
    except Exception as error:
        return _said(error)


def _drop_differs(
    model: nn.Module, topology: Topology, lists: Sequence[BlockList], example: tuple[Any, ...]
) -> str | None:
    """What is different between lists whose last block is switched off and those that have lost it, or None."""
    off = duplicate(model)
    for blocks in lists:
        as_elastic_block(off.get_submodule(blocks.blocks[-1])).set_active(False)
    expected = returned_by(off, example)
    try:
        got = returned_by(arrange(model, topology, {b.name: range(len(b.blocks) - 1) for b in lists}), example)
    except Exception as error:  # of code that knows its blocks by name or number
        return _said(error)
    inside = tuple(f"{blocks.container}." for blocks in lists)  # where names have moved

    def outside(returned: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        return {path: tensors for path, tensors in returned.items() if not path.startswith(inside)}

    for path, tensors in outside(expected).items():
        shapes = [[tensor.shape for tensor in side] for side in (tensors, got.get(path, []))]
        if shapes[0] != shapes[1]:
            return f"{path or 'the model'} returns other shapes without one of them"
    return _difference(outside(expected), outside(got))


def _difference(expected: dict[str, list[Tensor]], got: dict[str, list[Tensor]]) -> str | None:
    """What two runs returned differently, or None."""
    if expected.keys() != got.keys():
        return f"{sorted(expected.keys() ^ got.keys())[0]} runs in one of them only"
    compared = 0
    for path in expected:
        for one, other in zip(expected[path], got[path], strict=False):
            if one.shape != other.shape or not one.is_floating_point():
                continue
            compared += 1
            scale = one.abs().max().clamp(min=1e-12) if one.numel() else 1.0
            worst = float((one - other).abs().max() / scale) if one.numel() else 0.0
            if not worst <= TOLERANCE:
                return f"{path or 'the model'} differs by {worst:.1e}"
    return None if compared else "nothing could be compared"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _left(group: ChannelGroup, share: float, seed: int) -> list[int]:
    """Units that stay: about ``1 - share`` of them, drawn; each group keeps another share, so that those which only
    fit while they are of one size are found."""
    generator = torch.Generator().manual_seed(seed)
    stays = (1 - share) * (0.75 + 0.5 * torch.rand((), generator=generator).item())
    count = min(max(1, round(stays * group.units)), group.units - 1)
    return torch.randperm(group.units, generator=generator)[:count].tolist()
