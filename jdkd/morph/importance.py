"""How much a channel or a block matters, read off the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.graph import BlockList, ChannelGroup, Slot, Topology
from jdkd.morph.gradients import gradient_importance
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.channels import named, require_traced, tensor_named

READ_OFF = "gamma", "magnitude"  # criteria that need the weights alone
LEARNT = "taylor", "fisher"  # those that need batches to train on
CRITERIA = *READ_OFF, *LEARNT


def channel_importance(
    model: nn.Module,
    topology: Topology,
    criterion: str,
    batches: Iterable[Any] | None = None,
    *,
    relative: bool = False,
) -> dict[str, Tensor]:
    """How much every unit of every channel group matters, comparable between groups; all units together weigh 1.

    Gradients are in one unit whichever group they are of, and are divided by their sum over all groups.
    What is read off the weights has another scale in every layer (a norm after it, or the reader's weights, undo it):
    each group is divided by its own sum first, and weighs as much as its share of all units. To cut a share of the
    weakest of one group then costs what it costs in another.

    Args:
        model: the detector; it stays as it is.
        topology: of it.
        criterion: ``"gamma"``, see :func:`gamma_importance`, and magnitude where no norm is passed; ``"magnitude"``,
            see :func:`magnitude_importance`; ``"taylor"`` or ``"fisher"``, see :func:`gradient_importance`.
        batches: ``(images, targets)`` to train on, for the latter two.
        relative: of these, whether each loss counts by the share of itself that it would change by, or as it is.

    Returns:
        ``[units]`` by the name of the group, on the CPU; with the latter two also ``[1]`` by the path of each block
        that may go.

    Raises:
        InputError: there is no such criterion, or it needs batches.
    """
    model = unwrapped(model)
    require_traced(model, topology)
    if criterion not in CRITERIA:
        raise InputError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if criterion in LEARNT:
        if batches is None:
            raise InputError(f"criterion {criterion!r} needs batches of images and targets; give some, or 'gamma'.")
        found = gradient_importance(model, topology, batches, criterion, relative=relative)
    else:
        found = {}
        for group in topology.groups:
            slim = criterion == "gamma" and topology.norms(group)
            values = gamma_importance(model, topology, group) if slim else magnitude_importance(model, group)
            found[group.name] = values * group.units / values.sum().clamp(min=1e-12)
    total = sum(found[group.name].double().sum().item() for group in topology.groups)
    return {name: (values / max(total, 1e-30)).float() for name, values in found.items()}


def gamma_importance(model: nn.Module, topology: Topology, group: ChannelGroup) -> Tensor:
    """|gamma| of the norms that a group passes through, mean over several (Liu et al., ICCV 2017).

    Returns:
        ``[units]`` float tensor on the CPU; mean over the channels of a unit.
    """
    norms = {f"{norm}.weight" for norm in topology.norms(group)}
    gammas = [
        tensor_named(model, slot.tensor).detach().abs().float().cpu()[torch.from_numpy(slot.places)].mean(1)
        for slot in group.slots
        if slot.tensor in norms
    ]
    return torch.stack(gammas).mean(0)


def magnitude_importance(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Norm of what makes a unit times norm of what reads it; for groups without a normalisation.

    Every tensor's norms are divided by their mean first, so that no tensor speaks louder for its scale alone.

    Returns:
        ``[units]`` float tensor on the CPU.
    """
    sides = []
    for role in ("out", "in"):
        slots = [slot for slot in group.slots if slot.role == role]
        weights = [slot for slot in slots if tensor_named(model, slot.tensor).dim() > 1]
        sides.append(torch.stack([_norms(tensor_named(model, slot.tensor), slot) for slot in weights or slots]).mean(0))
    return sides[0] * sides[1]


def weakest_blocks(model: nn.Module, blocks: BlockList, count: int) -> tuple[int, ...]:
    """The blocks of a list that add least to what they are given, weakest first.

    That is read off what is nearest to their sums, in a residual block its last norm: the mean of its |gamma|.
    """
    strength = [_strength(model, ends) for ends in blocks.ends]
    return tuple(sorted(range(len(strength)), key=strength.__getitem__)[:count])


def _strength(model: nn.Module, ends: tuple[tuple[str, ...], ...]) -> float:
    """Mean |weight| of what is nearest to the sums of a block; infinite where that is not known.

    What cannot learn, as a frozen norm, is multiplied by what is before it, up to the first that can.
    """
    strengths = []
    for chain in ends:
        strength, learns = 1.0, False
        for name in chain:
            found = named(model, name.removeprefix("+"))
            weight = getattr(found, "weight", None) if isinstance(found, nn.Module) else found
            if learns or name.startswith("+") or not isinstance(weight, Tensor):
                continue
            strength *= weight.detach().abs().float().mean().item()
            learns = isinstance(weight, nn.Parameter)
        strengths.append(strength if learns else float("inf"))
    return float(np.mean(strengths)) if strengths else float("inf")


def _norms(tensor: Tensor, slot: Slot) -> Tensor:  # -> [units]
    others = [dim for dim in range(tensor.dim()) if dim != slot.dim]
    values = tensor.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # half precision overflows
    rows = torch.linalg.vector_norm(values, dim=others) if others else values.abs()
    norms = torch.linalg.vector_norm(rows.cpu()[torch.from_numpy(slot.places)], dim=1)
    return norms / norms.mean().clamp(min=1e-12)
