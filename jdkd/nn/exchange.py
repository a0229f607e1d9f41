"""Plain layers and blocks made elastic where they stand, and back: the class changes, the object stays.

Paths, parameters, hooks and attributes are those that were there, as the dynamic modules of NVIDIA ModelOpt have it.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_block import elastic_block_class
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.elastic_linear import ElasticLinear
from jdkd.nn.elastic_norm import ElasticGroupNorm, frozen_class

CLASSES: dict[type[nn.Module], type[Elastic]] = {
    nn.Conv2d: ElasticConv2d,
    nn.BatchNorm2d: ElasticBatchNorm2d,
    nn.Linear: ElasticLinear,
    nn.GroupNorm: ElasticGroupNorm,
}
_OWN = "_record", "_packing", "_packed", "_in_regions"  # attributes of an elastic module that a plain one has not


def elastic_class(kind: type[nn.Module]) -> type[Elastic] | None:
    """The elastic form of a class of layers; None where there is none, as for a subclass with a forward of its own."""
    if (kind.__module__, kind.__qualname__) == ("torchvision.ops.misc", "FrozenBatchNorm2d"):
        return frozen_class(kind)
    return CLASSES.get(kind)


def as_elastic(layer: nn.Module) -> nn.Module:
    """Makes a layer elastic in place; all of it is active.

    Args:
        layer: a convolution, linear layer or norm of torch, or torchvision's frozen batch normalisation.

    Returns:
        The layer itself.

    Raises:
        InputError: its class has no elastic form.
    """
    kind = elastic_class(type(layer))
    if kind is None:
        known = ", ".join(each.__name__ for each in CLASSES)
        raise InputError(f"as_elastic: a {type(layer).__name__} has no elastic form; {known} and frozen norms have one")
    return _of_class(layer, kind)


def as_elastic_block(block: nn.Module) -> nn.Module:
    """Makes a residual block of any class one that can be switched off, in place; it is on.

    Returns:
        The block itself.
    """
    return block if isinstance(block, Elastic) else _of_class(block, elastic_block_class(type(block)))


def as_plain(module: nn.Module) -> nn.Module:
    """Takes back :func:`as_elastic` or :func:`as_elastic_block`: the whole layer or block is plain again.

    Returns:
        The module itself.

    Raises:
        InputError: it holds more than a plain one, as norms with own statistics and convolutions with kernel transforms
            do; or its class is none that :func:`as_elastic` makes, as where a weight is parametrized.
    """
    kind = plain_class(module)
    for name in _OWN:
        vars(module).pop(name, None)
    return _became(module, kind)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that :func:`as_plain` gives a module, which stays as it is; raises what that raises."""
    if not isinstance(module, Elastic):
        return type(module)
    if getattr(module, "has_own_statistics", False) or getattr(module, "kernel_transform", False):
        raise InputError(f"as_plain: this {type(module).__name__} holds more than a plain layer; use jdkd.nn.export")
    kinds = (plain for plain, kind in CLASSES.items() if kind is type(module))
    kind = getattr(module, "plain", None) or next(kinds, None)
    if kind is None or is_parametrized(module):
        raise InputError(
            f"as_plain: a {type(module).__name__} is none of the classes that as_elastic makes; take away what changed "
            "it, as torch.nn.utils.parametrize.remove_parametrizations does, or use jdkd.nn.export"
        )
    return kind


def _of_class(module: nn.Module, kind: type[Elastic]) -> nn.Module:
    made = cast(Elastic, _became(module, kind))
    made.set_active()
    return made


def _became(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    module.__class__ = kind
    return module
