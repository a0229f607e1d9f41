"""Dropping, moving and adding residual blocks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.graph import BlockList, Topology
from jdkd.rewrite.channels import duplicate, whole


def arrange(model: nn.Module, topology: Topology, order: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of a model whose block lists hold the given blocks in the given order.

    Args:
        model: the module that ``topology`` was read off.
        topology: its block lists.
        order: by the name of a list, which of its blocks stand there. One that is left out is dropped; where one is
            named again a copy of it stands, born as the identity: what it adds to its input is 0, and learns
            (Joint-DetNAS adds its blocks so, with Dirac convolutions; here they are those of the one copied).

    Returns:
        The copy. Children of a plain ``nn.Sequential`` or ``nn.ModuleList`` are numbered anew, those of others keep
        their names.

    Raises:
        InputError: there is no such list, it holds no such block, a block cannot be born as the identity, or the model
            has other blocks than the topology.
    """
    copied = duplicate(model)
    arrange_in_place(copied, topology, order)
    return copied


def arrange_in_place(model: nn.Module, topology: Topology, order: Mapping[str, Sequence[int]]) -> None:
    """The same in the model itself.

    Raises:
        InputError: as :func:`arrange`; the model has not changed then, unless a block cannot be born as the identity.
    """
    modules = dict(model.named_modules())
    runs: dict[str, list[tuple[BlockList, list[int]]]] = {}  # of each container
    for name, places in order.items():
        blocks, places = topology.block_list(name), whole(f"blocks of the list {name!r}", places)
        last = len(blocks.blocks) - 1
        if any(not 0 <= place <= last for place in places):
            raise InputError(f"the list {name!r} has the blocks 0..{last}, and {places} names others.")
        if gone := [path for path in blocks.blocks if path not in modules]:
            raise InputError(
                f"the topology was read off another model: this {type(model).__name__} has no block {gone[0]!r}; read "
                "the model again after each rewrite."
            )
        runs.setdefault(blocks.container, []).append((blocks, places))
    for path, arranged in runs.items():
        container = model.get_submodule(path)
        set_children(container, _arranged(container, arranged))


def removable(model: nn.Module, blocks: BlockList) -> int:
    """How many blocks of a list may be dropped: all, but for the last child of their container."""
    others = len(model.get_submodule(blocks.container)._modules) - len(blocks.blocks)
    return len(blocks.blocks) - (others == 0)


def _arranged(container: nn.Module, runs: Sequence[tuple[BlockList, list[int]]]) -> list[tuple[str, nn.Module]]:
    """The children that a container is to have, where some runs of its blocks stand in another order."""
    children = dict(container._modules)
    stands: dict[str, list[tuple[str, nn.Module]]] = {}  # by the child in whose place they stand: the run's first
    leave: set[str] = set()
    for blocks, order in runs:
        names = [path.rpartition(".")[2] for path in blocks.blocks]
        chosen, seen = [], set()
        for place in order:
            block = children[names[place]]
            if place in seen:
                block = copy.deepcopy(block)
                _silence(block, blocks.blocks[place], blocks.ends[place])
            seen.add(place)
            chosen.append((names[place], block))
        stands[names[0]] = chosen
        leave.update(names)
    arranged: list[tuple[str, nn.Module]] = []
    for name, child in children.items():
        arranged += stands.get(name, [] if name in leave else [(name, child)])
    return arranged


def set_children(container: nn.Module, children: Sequence[tuple[str, nn.Module]]) -> None:
    """Gives a container these children, each with the name that it had or was copied from.

    Numbers of a plain ``nn.Sequential`` or ``nn.ModuleList`` are given anew; elsewhere the k-th copy of ``name`` is
    called ``name+k``.
    """
    plain = type(container) in (nn.Sequential, nn.ModuleList)
    container._modules.clear()
    copies: Counter[str] = Counter()
    for number, (name, child) in enumerate(children):
        name = name.partition("+")[0]
        unique = f"{name}+{copies[name]}" if copies[name] else name
        copies[name] += 1
        container._modules[str(number) if plain and name.isdigit() else unique] = child


@torch.no_grad()
def _silence(block: nn.Module, path: str, ends: Sequence[Sequence[str]]) -> None:
    """Makes what a block adds to its input 0, in a way that can be unlearnt."""
    for chain in ends:
        for name in chain:
            owner, _, leaf = name.removeprefix("+").removeprefix(f"{path}.").rpartition(".")
            if not name.removeprefix("+").startswith(f"{path}."):
                continue
            found = getattr(block.get_submodule(owner), leaf)
            learns = _set_to_zero(found) if isinstance(found, nn.Module) else found.zero_() is found
            if learns and not name.startswith("+"):
                break  # what comes before is multiplied by 0, and keeps its weights
        else:
            raise InputError(
                f"{path} cannot be born as the identity: nothing that can learn multiplies what it adds to its input "
                f"(it is made by {', '.join(chain) or 'no layer'})."
            )


def _set_to_zero(layer: nn.Module) -> bool:
    """Sets what a layer makes to 0 and says whether that can be unlearnt; a frozen norm makes 0 of 0."""
    for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if name == "bias" or (name == "running_mean" and not isinstance(layer.weight, nn.Parameter)):
            tensor.zero_()
    if isinstance(getattr(layer, "weight", None), nn.Parameter):
        layer.weight.zero_()
        return True
    return False


@torch.no_grad()
def with_checked_ends(model: nn.Module, lists: Sequence[BlockList], given: Mapping[str, Any]) -> tuple[BlockList, ...]:
    """Block lists in which every block that is not the identity when it is silenced has lost its ends.

    Args:
        model: whose they are, in evaluation mode.
        lists: as traced.
        given: what each block was given, positional and named arguments, by its path.
    """
    return tuple(
        replace(
            blocks,
            ends=tuple(
                ends if _is_identity(model.get_submodule(path), path, ends, given.get(path)) else ((),)
                for path, ends in zip(blocks.blocks, blocks.ends, strict=True)
            ),
        )
        for blocks in lists
    )


def _is_identity(block: nn.Module, path: str, ends: Sequence[Sequence[str]], given: Any) -> bool:
    """Whether a block returns what it is given once it is silenced."""
    if given is None:  # it did not run again
        return False
    silent = copy.deepcopy(block)
    try:
        _silence(silent, path, ends)
    except InputError:
        return False
    expected = given[0][0].clone()
    return torch.allclose(silent(*given[0], **given[1]), expected, rtol=1e-5, atol=0)
