"""A model as it is best compared with its rewrites: what its modules return, in float64 and with drawn weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from jdkd.rewrite.channels import duplicate


def returned_by(model: nn.Module, example: tuple[Any, ...]) -> dict[str, list[Tensor]]:
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


def comparable(
    model: nn.Module, example: tuple[Any, ...]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, list[Tensor]]]:
    """The model and its example as they are best compared, and what its modules return: in double precision, so that
    rounding does not decide which boxes survive, and with weights of no pattern, as zeros hide differences."""

    def doubled(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    for wide, drawn in ((True, True), (True, False), (False, True)):
        copied = duplicate(model)
        copied, given = (copied.double(), tree_map(doubled, example)) if wide else (copied, example)
        try:
            if drawn:
                _draw_weights(copied)
                with _scaled(copied):
                    returned_by(copied, given)
            returned = returned_by(copied, given)
        except Exception:  # a model that casts by itself, or whose weights mean more than weights
            continue
        if all(torch.isfinite(tensor).all() for tensor in returned[""]):
            return copied, given, returned
    copied = duplicate(model)
    return copied, example, returned_by(copied, example)


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
