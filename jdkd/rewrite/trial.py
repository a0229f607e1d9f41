"""A model as it is best compared with its rewrites: what its modules return, in float64 and with drawn weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jdkd.rewrite.channels import duplicate
from jdkd.rewrite.comparison import Returned, returned_by, run


class Trial(NamedTuple):
    """A model as it is compared.

    Args:
        model: a copy.
        example: what it runs on.
        returned: what its modules return.
        given: what the watched modules were given first: positional and named arguments, by path.
    """

    model: nn.Module
    example: tuple[Any, ...]
    returned: Returned
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def comparable(model: nn.Module, example: tuple[Any, ...], watched: Sequence[str] = ()) -> Trial:
    """The model and its example as they are best compared, and what its modules return.

    In double precision, so that rounding does not decide which boxes survive, and with weights of no pattern, as zeros
    hide differences; where the model does not run like that, without the one or the other.

    Args:
        model: stays as it is.
        example: what it was traced with.
        watched: paths of the modules whose inputs are wanted.
    """
    for wide, drawn in ((True, True), (True, False), (False, True)):
        copied = duplicate(model)
        copied, given = (copied.double(), tree_map(_doubled, example)) if wide else (copied, example)
        try:
            if drawn:
                _draw_weights(copied)
                with _scaled(copied):
                    run(copied, given)
            trial = _tried(copied, given, watched)
        except Exception:  # a model that casts by itself, or whose weights mean more than weights
            continue
        if all(torch.isfinite(tensor).all() for tensor in trial.returned[""]):
            return trial
    return _tried(duplicate(model), example, watched)


def _tried(model: nn.Module, example: tuple[Any, ...], watched: Sequence[str]) -> Trial:
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(path: str) -> Callable[..., None]:
        def entered(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if path not in given:
                given[path] = copy.deepcopy((inputs, named))

        return entered

    handles = [model.get_submodule(p).register_forward_pre_hook(remember(p), with_kwargs=True) for p in watched]
    try:
        return Trial(model, example, returned_by(model, example), given)
    finally:
        for handle in handles:
            handle.remove()


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@torch.no_grad()
def _draw_weights(model: nn.Module) -> None:
    """Draws parameters, and what norms have of statistics, so that signals neither die out nor explode."""
    generator = torch.Generator().manual_seed(0)
    statistics = [buffer for m in model.modules() if hasattr(m, "running_var") for buffer in m.buffers(recurse=False)]
    for tensor in (*model.parameters(), *statistics):
        if tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 0
            drawn = torch.empty(tensor.shape)
            if fan_in:
                drawn.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            else:
                drawn.uniform_(0.3, 0.9, generator=generator)
            tensor.copy_(drawn)


@contextmanager
def _scaled(model: nn.Module) -> Iterator[None]:
    """While it lasts every layer that runs is scaled, once, so that its outputs have unit variance.

    Without it scores of a deep model saturate, and equal scores are sorted by chance (layer-sequential unit variance,
    Mishkin and Matas, ICLR 2016).
    """
    done: set[nn.Module] = set()

    def ran(module: nn.Module, inputs: Any, out: Any) -> Any:
        if module in done or not isinstance(out, Tensor) or out.numel() < 2:
            return None
        done.add(module)
        scale = out.std().clamp(min=1e-12)
        for parameter in module.parameters(recurse=False):
            parameter.div_(scale)
        return out / scale

    layers = [m for m in model.modules() if getattr(m._parameters.get("weight"), "ndim", 0) > 1]
    handles = [layer.register_forward_hook(ran) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
