"""Activation checkpointing with the subnet of the forward, and with its packed weights.

How a change of subnet is noticed is in :mod:`jdkd.nn.subnet_epoch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic
from jdkd.nn.packed_weight import ElasticWeight
from jdkd.nn.subnet_epoch import recomputation


class SubnetState:
    """The subnet of a model at one moment, and its packed weights, to be brought back for the length of a ``with``.

    Args:
        model: holds the elastic layers.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._kept: list[tuple[nn.Module, str, Any]] = []
        self._kept += [(module, "_record", module._record) for module in modules if isinstance(module, Elastic)]
        self._kept += [(module, "_packed", module._packed) for module in modules if isinstance(module, ElasticWeight)]
        self._before: list[list[Any]] = []
        if recomputation() is None:
            for module in modules:
                if isinstance(module, Elastic):
                    module._record.since.observe()  # before autograd numbers the node of a checkpoint

    def __enter__(self) -> None:
        self._before.append([getattr(module, name) for module, name, _ in self._kept])
        for module, name, value in self._kept:
            setattr(module, name, value)

    def __exit__(self, *_: object) -> None:
        for (module, name, _), value in zip(self._kept, self._before.pop(), strict=True):
            setattr(module, name, value)


def checkpoint(
    function: Callable[..., Any],
    *inputs: Any,
    model: nn.Module | None = None,
    use_reentrant: bool = False,
    **options: Any,
) -> Any:
    """Runs a function without keeping its activations; it is recomputed with the subnet of this forward.

    Elastic layers under ``torch.utils.checkpoint.checkpoint`` raise an error where a subnet was set between forward and
    backward. What plain ``torch.compile`` compiled does not check this, and would recompute with the wrong subnet: run
    it by this function, with its ``model``.

    Args:
        function: what to run, a module or a function of one.
        inputs: its arguments.
        model: holds every elastic layer that runs; ``function`` itself if it is a module.
        use_reentrant: which of torch's two forms.
        options: for ``torch.utils.checkpoint.checkpoint``; the function gets those that are none of its options, as
            keyword arguments, unless ``use_reentrant``.

    Returns:
        What the function returns.

    Raises:
        InputError: if there is no telling which layers run.
    """
    owner = function if model is None else model
    if not isinstance(owner, nn.Module):
        raise InputError(
            f"checkpoint: {function!r} is no module; give the model whose elastic layers it runs as model="
        )
    state = SubnetState(owner)

    def run(*inputs: Any, **named: Any) -> Any:
        with state:
            return function(*inputs, **named)

    return torch_checkpoint.checkpoint(run, *inputs, use_reentrant=use_reentrant, **options)
