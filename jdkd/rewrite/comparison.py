"""What the modules of a model return for one example, and what a rewrite of it returns differently."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

TOLERANCE = 1e-4  # largest difference over the largest value
Returned = dict[str, list[Tensor]]  # by the path of a module, call after call


def run(model: nn.Module, example: tuple[Any, ...]) -> None:
    """One forward in evaluation mode, always with the same chance."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.eval()(*copy.deepcopy(example))


def returned_by(model: nn.Module, example: tuple[Any, ...]) -> Returned:
    """What every module returned."""
    returned: Returned = defaultdict(list)

    def heard(path: str, tensors: list[Tensor]) -> None:
        returned[path] += [tensor.detach().clone() for tensor in tensors]

    with _listening(model, heard):
        run(model, example)
    return returned


def difference(
    expected: Returned,
    model: nn.Module,
    example: tuple[Any, ...],
    *,
    skip: tuple[str, ...] = (),
    same_shapes: bool = False,
) -> str | None:
    """What a model returns differently.

    Args:
        expected: what :func:`returned_by` heard of another model.
        model: compared while it runs, so that nothing of it is kept.
        example: what both run on.
        skip: beginnings of the paths of modules that are not compared.
        same_shapes: whether another shape is a difference; else such tensors are not compared.

    Returns:
        Where it differs or what it raised, or None.
    """
    heard_of: Counter[str] = Counter()
    compared, found = 0, None

    def heard(path: str, tensors: list[Tensor]) -> None:
        nonlocal compared, found
        if path.startswith(skip):
            return
        for one, other in zip(expected.get(path, [])[heard_of[path] :], tensors, strict=False):
            if found is None and same_shapes and one.shape != other.shape:
                found = f"{path or 'the model'} returns {list(other.shape)} in the place of {list(one.shape)}"
            elif found is None and one.shape == other.shape and one.is_floating_point():
                compared += 1
                error = _relative(one, other)
                if not error <= TOLERANCE:
                    found = f"{path or 'the model'} differs by {error:.1e}"
        heard_of[path] += len(tensors)

    try:
        with _listening(model, heard):
            run(model, example)
    except Exception as error:  # whatever a model's code makes of other channels
        return said(error)
    wanted = {path for path in expected if not path.startswith(skip)}
    if elsewhere := sorted(wanted ^ heard_of.keys()):
        return f"{elsewhere[0]} runs in one of them only"
    return found or (None if compared else "nothing could be compared")


def said(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _relative(one: Tensor, other: Tensor) -> float:
    if not one.numel():
        return 0.0
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


@contextmanager
def _listening(model: nn.Module, heard: Callable[[str, list[Tensor]], None]) -> Iterator[None]:
    """Calls ``heard`` with a module's path and the tensors that it returned, whenever one did."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, inputs, out: heard(path, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
