"""See :func:`verify`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from jdkd.graph import ChannelGroup, Frozen, Topology
from jdkd.rewrite.channels import mask, prune

TOLERANCE = 1e-4  # largest difference over the largest value


def verify(model: nn.Module, topology: Topology, *example: Any, share: float = 0.5) -> Topology:
    """Cuts every group of a topology once, and compares with the model in which nothing reads what was cut.

    Both run on the example in evaluation mode, in float64 where the model can; compared is whatever any module returns
    that kept its shape. All groups are cut together first; only if something disagrees is it looked for by halves.

    Args:
        model: the module that ``topology`` was read off.
        topology: what :func:`jdkd.graph.trace` found.
        *example: what it was traced with.
        share: of each group's units, how many go.

    Returns:
        The topology, with the groups that disagreed among the frozen ones, and the reason.
    """
    exact, example = _in_float64(model, example)
    wrong: dict[str, str] = {}

    def search(groups: Sequence[ChannelGroup]) -> None:
        reason = _disagreement(exact, topology, groups, example, share)
        if reason is None:
            return
        if len(groups) == 1:
            wrong[groups[0].name] = reason
            return
        half = len(groups) // 2
        before = len(wrong)
        search(groups[:half])
        search(groups[half:])
        if len(wrong) == before:  # each is right alone, and they are wrong together
            wrong.update({group.name: f"{reason}, together with its neighbours" for group in groups})

    groups = [group for group in topology.groups if group.units > 1]
    if groups:
        search(groups)
    frozen = [
        Frozen(tuple((slot.tensor, slot.dim) for slot in topology[name].slots), f"cut and masked disagree: {reason}")
        for name, reason in wrong.items()
    ]
    kept = tuple(group for group in topology.groups if group.name not in wrong)
    return replace(topology, groups=kept, frozen=(*topology.frozen, *frozen))


def _disagreement(
    model: nn.Module, topology: Topology, groups: Sequence[ChannelGroup], example: tuple[Any, ...], share: float
) -> str | None:
    """What is different between cut and masked, or None."""
    keep = {group.name: range(0, group.units, 2) if share == 0.5 else range(_left(group, share)) for group in groups}
    expected = _returned(mask(model, topology, keep), example)
    try:
        got = _returned(prune(model, topology, keep), example)
    except Exception as error:  # whatever a model's code makes of fewer channels
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
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


def _left(group: ChannelGroup, share: float) -> int:
    return max(1, round(group.units * (1 - share)))


def _returned(model: nn.Module, example: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What every module returned, by its path, call after call."""
    returned: dict[str, list[Tensor]] = defaultdict(list)
    with _listening(model, returned), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.eval()(*copy.deepcopy(example))
    return returned


@contextmanager
def _listening(model: nn.Module, returned: dict[str, list[Tensor]]) -> Iterator[None]:
    def hook(path: str):
        def heard(module: nn.Module, inputs: Any, out: Any) -> None:
            returned[path] += [leaf.detach().clone() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]

        return heard

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_float64(model: nn.Module, example: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model and its example in double precision, so that rounding does not decide which boxes survive."""

    def doubled(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    exact, wide = copy.deepcopy(model).double(), tree_map(doubled, example)
    try:
        _returned(exact, wide)
        return exact, wide
    except Exception:  # a model that casts by itself runs as it is
        return copy.deepcopy(model), example
