"""See :func:`fuse_for_inference`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from jdkd.detect import fix_roi_scales
from jdkd.detect.contract import not_scripted
from jdkd.nn.unwrapping import unwrapped

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
FORWARDS = {norm.forward for norm in NORMS}


class _Tracer(fx.Tracer):
    """Keeps every module without children whole, so that a graph shows which layer feeds which."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return super().is_leaf_module(module, qualified_name) or not any(True for _ in module.children())


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Copy a detector into the form in which it is timed, scored and shipped.

    The copy is in eval mode without gradients, every batch normalisation that directly follows a convolution
    is folded into it, and convolution weights are channels-last. What follows what is read from the traced
    data flow, not from names; a part of the network that cannot be traced (the RPN's control flow, say) is
    searched child by child. A normalisation whose convolution feeds anything else, that is used more than once,
    that keeps no statistics or has a forward of its own, stays; so does one where it or its convolution has hooks, as
    `torch.nn.utils.weight_norm`, `spectral_norm` and `prune` leave them, or another forward than its class.

    Args:
        model: any detector; it is left as it was. Of one that torch wraps (DDP, EMA, `torch.compile`), the detector
            inside is taken.

    Returns:
        The fused copy, on the device of `model`. Outputs agree up to the rounding of the folded weights.

    Raises:
        InputError: a part of it is scripted or traced.
    """
    not_scripted(model, "fuse_for_inference")
    model = unwrapped(model)
    plain = [each for module in model.modules() for each in vars(module).values() if isinstance(each, Tensor)]
    computed = {id(each): each.detach().clone() for each in plain if not each.is_leaf}  # by hooks; not copied otherwise
    model = copy.deepcopy(model, computed).eval().requires_grad_(False)
    fix_roi_scales(model)
    for conv_name, norm_name in foldable(model).items():
        conv, norm = cast(nn.Conv2d, model.get_submodule(conv_name)), model.get_submodule(norm_name)
        if any(is_hooked(each) or not is_plain(each) for each in (conv, norm)):
            continue
        conv.weight, conv.bias = folded(conv, norm)
        conv.requires_grad_(False)
        model.set_submodule(norm_name, nn.Identity().eval())
    return cast(Any, model).to(memory_format=torch.channels_last)


def foldable(model: nn.Module) -> dict[str, str]:
    """The convolutions of a model that a normalisation directly follows, with nothing in between, and which that is.

    Args:
        model: in eval mode; parts of it are traced symbolically.

    Returns:
        Names of normalisations by those of convolutions.
    """
    occurrences = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {
        conv: norm
        for conv, norm in _conv_norm_pairs(model, "")
        if all(occurrences[id(model.get_submodule(name))] == 1 for name in (conv, norm))
    }


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight ``[Cout, Cin, kh, kw]`` and bias ``[Cout]`` of a convolution with a normalisation folded in."""
    of: Any = norm  # that is_affine
    return fuse_conv_bn_weights(conv.weight, conv.bias, of.running_mean, of.running_var, of.eps, of.weight, of.bias)


def is_affine(layer: nn.Module) -> bool:
    """Whether all that a layer does in eval mode is to scale and shift each channel by numbers that it holds.

    A batch normalisation does, unless it keeps no statistics, or is of a class with a forward of its own: one that has
    an activation in it, say.
    """
    return isinstance(layer, NORMS) and type(layer).forward in FORWARDS and layer.running_mean is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hears, and may change, what a module is called with, returns or computes with."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(module: nn.Module) -> bool:
    """Whether its class says what a module does, and nothing that was put in the place of its forward."""
    own = vars(module).get("forward")
    return own is None or (isinstance(own, MethodType) and own == MethodType(type(module).forward, module))


def batch_norms(model: nn.Module) -> int:
    """Number of batch normalisations in `model`, frozen ones included: 0 for a fully folded network."""
    return sum(isinstance(module, NORMS) for module in model.modules())


def _conv_norm_pairs(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (convolution, normalisation) names under `prefix`, from the largest parts that can be traced."""
    if not any(isinstance(child, NORMS) for child in module.modules()) or isinstance(module, NORMS):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a forward raises on symbolic values: its children are tried instead
        for name, child in module.named_children():
            yield from _conv_norm_pairs(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or not is_affine(module.get_submodule(str(node.target))):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        once = calls[node.target] == 1 and calls[source.target] == 1
        if once and type(module.get_submodule(str(source.target))) is nn.Conv2d:
            yield f"{prefix}{source.target}", f"{prefix}{node.target}"
