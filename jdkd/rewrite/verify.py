"""See :func:`verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.graph import ChannelGroup, Frozen, Topology
from jdkd.graph.topology import DISAGREES
from jdkd.rewrite.blocks import with_checked_ends
from jdkd.rewrite.channels import mask, prune, widen
from jdkd.rewrite.trial import comparable, returned_by

TOLERANCE = 1e-4  # largest difference over the largest value


def verify(model: nn.Module, topology: Topology, *example: Any, share: float = 0.5) -> Topology:
    """Cuts every group of a topology once, and compares with the model in which nothing reads what was cut.

    Both run on the example in evaluation mode, in float64 and with drawn weights where the model can; compared is
    whatever any module returns that kept its shape. All groups are cut together first, each to another share, and only
    if something disagrees is it looked for by halves. Then all are widened, which may change nothing, and every block
    of a list is silenced, which must make it the identity.

    Args:
        model: the module that ``topology`` was read off.
        topology: what :func:`jdkd.graph.trace` found.
        *example: what it was traced with.
        share: of each group's units, how many go.

    Returns:
        The topology, with the groups that disagreed among the frozen ones, and the reason; with those that cannot grow
        marked, and without the ends of blocks that cannot be born as the identity.
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
    return replace(
        topology,
        groups=tuple(replace(group, grows=group.name not in stiff) for group in right),
        frozen=(*topology.frozen, *frozen),
        block_lists=with_checked_ends(exact, topology.block_lists, example),
    )


def _culprits(
    groups: Sequence[ChannelGroup], difference: Callable[[Sequence[ChannelGroup]], str | None]
) -> dict[str, str]:
    """The groups that make a difference, and which; they are looked for by halves."""
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
