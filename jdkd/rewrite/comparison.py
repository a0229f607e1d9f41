"""What the modules of a model return for one example, and what a rewrite of it returns differently."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from jdkd.errors import said

TOLERANCE = 1e-4  # largest difference over the largest value
Returned = dict[str, list[Tensor]]  # by the path of a module, call after call


def run(model: nn.Module, example: tuple[Any, ...]) -> None:
    """One forward in evaluation mode, always with the same chance."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.eval()(*copy.deepcopy(example))


def returned_by(model: nn.Module, example: tuple[Any, ...], inside: bool = True) -> Returned:
    """What every module returned; without those ``inside`` of others, what the model and its children did."""
    returned: Returned = defaultdict(list)

    def heard(path: str, tensors: list[Tensor]) -> None:
        returned[path] += [tensor.detach().clone() for tensor in tensors]

    with _listening(model, heard, inside):
        run(model, example)
    return returned


def difference(expected: Returned, model: nn.Module, example: tuple[Any, ...], inside: bool = True) -> str | None:
    """Where a model returns something else than expected, or what it raised, or None."""
    try:
        found = errors(expected, model, example, inside)
    except Exception as error:  # whatever a model's code makes of other channels
        return said(error)
    if elsewhere := sorted({path for path in expected if inside or "." not in path} ^ found.keys()):
        return f"{elsewhere[0]} runs in one of them only"
    if all(error is None for error in found.values()):
        return "nothing could be compared"
    wrong = ((path, error) for path, error in found.items() if error is not None and not error <= TOLERANCE)
    return next((f"{path or 'the model'} differs by {error:.1e}" for path, error in wrong), None)


def errors(
    expected: Returned, model: nn.Module, example: tuple[Any, ...], inside: bool = True
) -> dict[str, float | None]:
    """By how much every module of a model differs, in the order in which they are done first.

    Args:
        expected: what :func:`returned_by` heard of another model.
        model: compared while it runs, so that nothing of it is kept.
        example: what both run on.
        inside: whether modules inside of others are compared too; where they stand elsewhere they cannot be.

    Returns:
        By path the largest difference over the largest value of a tensor; None where nothing kept its shape, which
        only modules ``inside`` may change.
    """
    found: dict[str, float | None] = {}
    calls: Counter[str] = Counter()

    def heard(path: str, tensors: list[Tensor]) -> None:
        found.setdefault(path, None)
        for one, other in zip(expected.get(path, [])[calls[path] :], tensors, strict=False):
            if one.shape != other.shape and not inside:
                found[path] = float("inf")
            elif one.shape == other.shape and one.is_floating_point():
                error = float((one - other).abs().max() / one.abs().max().clamp(min=1e-12)) if one.numel() else 0.0
                found[path] = float(np.maximum(error, found[path] or 0.0))  # nan stays
        calls[path] += len(tensors)

    with _listening(model, heard, inside):
        run(model, example)
    return found


def culprits(names: Sequence[str], differs: Callable[[Sequence[str]], str | None]) -> dict[str, str]:
    """Those of some names that make a difference, and which; they are looked for by halves."""
    reason = differs(names) if names else None
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    half = len(names) // 2
    found = culprits(names[:half], differs) | culprits(names[half:], differs)
    return found or dict.fromkeys(names, f"{reason}, together with its neighbours")


@contextmanager
def _listening(model: nn.Module, heard: Callable[[str, list[Tensor]], None], inside: bool) -> Iterator[None]:
    """Calls ``heard`` with a module's path and the tensors that it returned, whenever one did."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, inputs, out: heard(path, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])

    handles = [
        module.register_forward_hook(hook(path)) for path, module in model.named_modules() if inside or "." not in path
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
