"""Modules that ``torch.fx`` takes for one node, as it takes those of torch: what they run depends on what is active."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

from jdkd.errors import InputError

__all__ = ["Proxy", "as_node"]


def as_node(module: nn.Module, proxy: Proxy, *inputs: Any, **named: Any) -> Any:
    """The call of a module as one node of the graph that is being traced; the graph stays right for every subnet.

    Args:
        module: that is called.
        proxy: one of its inputs, which knows the tracer.
        inputs, named: all of them.

    Raises:
        InputError: if the module is traced by itself, and so is no part of a model.
    """
    tracer = proxy.tracer
    if module is getattr(tracer, "root", None):
        raise InputError(
            f"torch.fx cannot trace {type(module).__name__} by itself; trace a model that holds it, as one node, or "
            "what jdkd.nn.export makes of it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, named)
