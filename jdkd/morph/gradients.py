"""What the losses say of each channel and block: first-order Taylor and Fisher importance over coupled groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from jdkd.detect.contract import losses_complaint
from jdkd.errors import InputError, require_batches
from jdkd.graph import ChannelGroup, Slot, Topology
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.channels import named, require_traced

STILL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, StochasticDepth)
DROP_PATH = "DropPath"  # stochastic depth as timm calls it


def gradient_importance(
    model: nn.Module, topology: Topology, batches: Iterable[Any], criterion: str, *, relative: bool = False
) -> dict[str, Tensor]:
    """How much the losses would change without each unit and each block, to first order: the mean square.

    ``taylor`` sums weight times gradient over what makes a unit (the weights and biases of its norms, where it passes
    some) and takes the mean square over batches (Molchanov et al., CVPR 2019). ``fisher`` takes the gradient of one
    mask on the unit at all places that read it, and the mean square over images (Liu et al., Group Fisher Pruning, ICML
    2021); a mask's gradient is weight times gradient, summed over the weights that read the unit, so no activation is
    kept. As in both papers no root is taken. Norms use their running statistics, dropout is off, and chance is the same
    in every call.

    Args:
        model: a detector that gives its losses while it trains; modes, gradients, buffers and random numbers stay as
            they are.
        topology: of it.
        batches: ``(images, targets)``.
        criterion: ``"taylor"`` or ``"fisher"``.
        relative: whether each loss counts by the share of itself that it would change by, or as it is. A loss that the
            detector has learnt by heart, see :func:`smallest_loss`, has next to no gradient as it is, and what it needs
            seems not to matter: the first cut of an FCOS that no longer gained took half of its classification head,
            and nearly all mAP with it. (Our choice.)

    Returns:
        ``[units]`` by the name of the group and ``[1]`` by the path of each block that may go, on the CPU, comparable
        with each other: shares of losses, squared, or in the unit of the losses, squared.

    Raises:
        InputError: there is no batch, or its losses are none, not finite or need no parameter.
    """
    model = unwrapped(model)
    require_traced(model, topology)
    slots = {group.name: _speaking(group, topology, criterion) for group in topology.groups}
    ends = _ends(model, topology)
    wanted = dict.fromkeys(slot.tensor for found in slots.values() for slot in found)
    wanted |= dict.fromkeys(name for block in ends.values() for names in block for name in names)
    parameters = {name: named(model, name) for name in wanted}
    parameters = {
        name: tensor
        for name, tensor in parameters.items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    }
    sums = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in topology.groups}
    sums |= {path: torch.zeros(1, dtype=torch.float64) for path in ends}
    count = 0
    with _still(model), _differentiable(parameters.values()):
        for images, targets in _bites(batches, one_by_one=criterion == "fisher"):
            products = _products(model, parameters, images, targets, relative)
            for group in topology.groups:
                sums[group.name] += _summed(group, slots[group.name], products).square()
            for path, block in ends.items():
                for names in block:
                    own = [products[name] for name in names if name in products]
                    if own:
                        sums[path] += sum(each.reshape(len(each), -1).sum(1) for each in own).square().sum()
            count += 1
    require_batches(count, f"{criterion} importance")
    return {name: (values / count).float() for name, values in sums.items()}


def smallest_loss(model: nn.Module, batches: Iterable[Any]) -> float:
    """The smallest of a detector's losses over the largest, each the mean over batches.

    One that is 0, as that of what no image has, does not count.

    Args:
        model, batches: as of :func:`gradient_importance`.
    """
    means: dict[str, float] = defaultdict(float)
    with _still(unwrapped(model)), torch.no_grad():
        for images, targets in _bites(batches, one_by_one=False):
            for name, loss in _losses(model, images, targets).items():
                means[name] += abs(float(loss))
    some = [mean for mean in means.values() if mean > 0] or [1.0]
    return min(some) / max(some)


def _speaking(group: ChannelGroup, topology: Topology, criterion: str) -> list[Slot]:
    """Where the gradient of a group's units is read."""
    if criterion == "fisher":
        return [slot for slot in group.slots if slot.role == "in"]
    norms = topology.norms(group)
    made = [slot for slot in group.slots if slot.role == "scale" and slot.tensor.rpartition(".")[0] in norms]
    return made or [slot for slot in group.slots if slot.role == "out"]


def _ends(model: nn.Module, topology: Topology) -> dict[str, list[list[str]]]:
    """For every block that is known to be the identity without them: for each sum in it, the parameters that scale and
    shift the channels which are added, in the last layer that learns."""
    found = {
        path: [_learning(model, chain) for chain in ends]
        for blocks in topology.block_lists
        for path, ends in zip(blocks.blocks, blocks.ends, strict=True)
    }
    return {path: block for path, block in found.items() if all(block)}


def _learning(model: nn.Module, chain: Sequence[str]) -> list[str]:
    """The parameters of the first in a chain of layers and parameters that is multiplied and learns."""
    for name in chain:
        if name.startswith("+"):
            continue
        found = named(model, name)
        own = (
            {name: found}
            if isinstance(found, Tensor)
            else {f"{name}.{leaf}": each for leaf, each in found.named_parameters(recurse=False)}
        )
        if any(isinstance(each, nn.Parameter) for each in own.values()):
            return list(own)
    return []


def _summed(group: ChannelGroup, slots: Sequence[Slot], products: dict[str, Tensor]) -> Tensor:  # -> [units], float64
    total = torch.zeros(group.units, dtype=torch.float64)
    for slot in slots:
        if slot.tensor in products:
            product = products[slot.tensor]
            rows = (
                product.sum([dim for dim in range(product.dim()) if dim != slot.dim]) if product.dim() > 1 else product
            )
            total += rows[torch.from_numpy(slot.places)].sum(1)
    return total


def _products(
    model: nn.Module, parameters: dict[str, Tensor], images: Sequence[Tensor], targets: Sequence[Any], relative: bool
) -> dict[str, Tensor]:
    """Weight times gradient of the sum of the losses, or of the losses each over its own size, on the CPU."""
    with torch.enable_grad():
        losses = _losses(model, images, targets)
        if complaint := losses_complaint(losses, trains=True):
            raise InputError(f"importance needs losses, and {type(model).__name__} returned {complaint}.")
        loss = sum(losses.values())
        weighed = sum(map(_over_itself, losses.values())) if relative else loss
        gradients = torch.autograd.grad(weighed, list(parameters.values()), allow_unused=True)
    if not loss.isfinite():
        raise InputError(
            f"importance needs finite losses, and those of this {type(model).__name__} are {loss.item()}; train it at "
            "a lower lr first."
        )
    return {
        name: (tensor.detach() * gradient).double().cpu()
        for (name, tensor), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is not None
    }


def _losses(model: nn.Module, images: Sequence[Tensor], targets: Sequence[Any]) -> Any:
    """What it returns while it trains, by the same chance in every call."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return model(list(images), list(targets))


def _over_itself(loss: Tensor) -> Tensor:
    """A loss over its size; one that is exactly 0, as where there is nothing to find, as it is."""
    size = loss.detach().abs()
    return loss / size.where(size > 0, 1.0)


def _bites(batches: Iterable[Any], one_by_one: bool) -> Iterator[tuple[Sequence[Tensor], Sequence[Any]]]:
    for batch in batches:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not all(isinstance(half, Sequence | Tensor) for half in batch):
            raise InputError(f"importance needs batches (images, targets), a list of each, got {batch!r:.60}.")
        images, targets = batch
        if one_by_one:
            for image, target in zip(images, targets, strict=True):
                yield [image], [target]
        else:
            yield images, targets


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In training mode, but for norms with running statistics, dropout and stochastic depth."""
    with mode(model, training=True):
        for module in model.modules():
            if isinstance(module, STILL) or type(module).__name__ == DROP_PATH:
                module.training = False
        yield


@contextmanager
def _differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Lets frozen parameters have gradients for a while."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
