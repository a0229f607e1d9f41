"""A supernet under ``torch.compile``: compiled in pieces, whose graphs stay when the subnet changes.

Left to itself the compiler takes every number it meets for a constant and compiles a whole model again for every
subnet, until it gives up after eight. Here the numbers of active channels are lengths of tensors, marked as
dynamic, convolutions are operators that it does not look into (:mod:`jdkd.ops.elastic_conv_traced`), and a
loop over elastic depth is no part of any graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic
from jdkd.nn.elastic_block import ElasticBlock
from jdkd.nn.unwrapping import unwrapped

Model = TypeVar("Model", bound=nn.Module)


def compile_elastic(model: Model, **options: Any) -> Model:
    """Compiles a model with elastic layers, in place, so that a change of subnet does not compile it again.

    The model is cut into regions at its elastic depth: each :class:`ElasticBlock` is a region, and so is every other
    module that holds no such block and has layers within. What runs the blocks, and layers that stand beside them, run
    as they did. A model without such blocks is one region. A region compiles when it first runs, and again

    - never for another number or list of channels, or another kernel size, except where one single channel is active
      (a size of 1 is a constant to the compiler, and costs one compile a place);
    - never for another depth: blocks that had not run before compile when they do;
    - once for another batch or image size, as with ``torch.compile``, for training and evaluation, and for gradients
      on and off;
    - once for every subnet where batch norms keep statistics of their own.

    Where ``padding_mode`` is not ``"zeros"``, a smaller kernel pads by the border of the whole kernel and leaves out
    what it does not read. A map too small for that border is refused by torch, though the layer would run by itself.

    ``torch.compiler.reset()`` forgets what was compiled; copies and :func:`export` are not compiled.

    Args:
        model: any module; it is changed in place, and inside what wraps it, as ``DistributedDataParallel`` does.
            Parameters, state dict and the subnet stay what they are.
        options: for ``torch.compile``: ``backend``, ``mode``, ``fullgraph`` and so on. CUDA graphs of
            ``mode="reduce-overhead"`` leave the elastic convolutions out.

    Returns:
        The model.

    Raises:
        InputError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile_elastic: model is a {type(model).__name__}; give an nn.Module")
    for path, region in _regions("model", unwrapped(model)):
        _compile(path, region, options)
    return model


def _regions(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules within which no elastic block lies, by path; layers by themselves are none."""
    is_list = type(module).forward is nn.Module.forward
    if is_list or any(isinstance(inner, ElasticBlock) for inner in module.modules() if inner is not module):
        for name, child in module.named_children():
            yield from _regions(f"{path}.{name}", child)
    elif isinstance(module, ElasticBlock) or (
        not isinstance(module, Elastic) and next(module.children(), None) is not None
    ):
        yield path, module


def _compile(path: str, region: nn.Module, options: dict[str, Any]) -> None:
    layers = [module for module in region.modules() if isinstance(module, Elastic)]
    for layer in layers:
        layer._in_regions = True
        layer._record = layer._record._replace(traced=layer._traced(layer._record.active))
    compiled = torch.compile(_with_own_code(path), **options)

    def run(*inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or (isinstance(region, ElasticBlock) and not region.is_active):
            return region._call_impl(*inputs, **named)
        for layer in layers:  # where a checkpointed region sees that its subnet has changed: no graph looks at that
            layer._now()
        for value in pytree.tree_leaves((inputs, named)):
            if isinstance(value, Tensor) and value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, 1)  # [N, C, ...]
        return compiled(region, *inputs, **named)

    region._compiled_call_impl = run


def _with_own_code(path: str) -> Callable[..., Any]:
    """What calls a region: a function with a code of its own, by which the compiler counts and limits its compiles."""

    def call(region: nn.Module, *inputs: Any, **named: Any) -> Any:
        return region._call_impl(*inputs, **named)

    return types.FunctionType(call.__code__.replace(co_name=path), globals())
