"""Forwards on packed weights: the active weights of a whole model copied together, instead of a slice in every layer.

:func:`packed` packs once for many forwards, :func:`pack_forwards` anew at every forward. Nothing else decides how long
packed weights are used: no version counter tells of every write into a weight.

What stays as it is without packing: batch normalisation; kernel transforms; weights that are active as a whole in the
dtype wanted; weights that are computed at every access, as by ``torch.nn.utils.parametrize``, or are tensors of a
subclass; what ``torch.compile`` compiles; and calls under the transforms of ``torch.func``, unless the weights were
packed before. These take the slices of the shared weights, as do layers of which another part was made active, or whose
parameter was exchanged, since the weights were packed. A forward that a CUDA graph captures packs inside the graph, and
so does every replay.

With ``grad_mode="main_grad"`` the gradients of packed weights are added in place to ``weight.main_grad``, or else to
``weight.grad``, past autograd. Gradient hooks of the weights see None, and ``torch.autograd.grad`` finds nothing and
adds nothing. What is not packed, biases too, still gets its gradient from autograd, in ``grad``.
``DistributedDataParallel`` averages what is in ``grad``; of ``main_grad`` it knows nothing, nor do gradient scalers and
optimisers: average it yourself, and hand it to the optimiser. Neither mode has a second derivative with respect to a
packed weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.nn.packed_weight import ElasticWeight, WeightPacking, pack_together


class Packing(WeightPacking):
    """Who packs the layers of a model, and how; made by :func:`packed` and :func:`pack_forwards`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, grad_mode: str, where: str):
        super().__init__(dtype, grad_mode, where)
        self.layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, ElasticWeight)}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def _own(self) -> dict[str, ElasticWeight]:
        """The layers that no packing inside of this one has taken over."""
        return {path: layer for path, layer in self.layers.items() if layer._packing is self}

    def _read(self) -> dict[str, ElasticWeight]:
        """Those of them that read packed weights: what :func:`compile_elastic` compiles does not."""
        return {path: layer for path, layer in self._own().items() if not layer._in_regions}

    def _pack(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._drop()  # what a KeyboardInterrupt left behind
            pack_together(self._read(), self)

    def _pack_if_stale(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        read = self._read()
        if not all(layer._packed is not None and layer._packed.fits(layer) for layer in read.values()):
            pack_together(read, self)

    def _drop(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            for layer in self._own().values():
                vars(layer)["_packed"] = None

    def __getstate__(self) -> dict[str, Any]:  # a copy of the model has copies of the hooks, which then do nothing
        return {"dtype": self.dtype, "grad_mode": self.grad_mode, "layers": {}, "_hooks": []}


class PackedForwards(Packing):
    """What :func:`pack_forwards` returns: ends it by :meth:`remove`, or at the end of a ``with``."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, grad_mode: str):
        super().__init__(model, dtype, grad_mode, "pack_forwards")
        for path, layer in self.layers.items():
            if layer._packing is not None:
                raise InputError(
                    f"pack_forwards: {path or type(layer).__name__} is packed already; remove that handle, or leave "
                    "that with, first"
                )
        for layer in self.layers.values():
            layer._packing = self
        self._hooks = [
            model.register_forward_pre_hook(self._pack),
            model.register_forward_hook(self._drop, always_call=True),
        ]

    def remove(self) -> None:
        """The next forwards use slices again; a second call does nothing."""
        self._drop()
        for layer in self._own().values():
            layer._packing = None
        for hook in self._hooks:
            hook.remove()
        self.layers, self._hooks = {}, []

    def __enter__(self) -> PackedForwards:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@contextlib.contextmanager
def packed(model: nn.Module, *, dtype: torch.dtype | None = None, grad_mode: str = "autograd") -> Iterator[nn.Module]:
    """Packs the active weights of a model's elastic layers in one launch, for all forwards inside the ``with``.

    For frozen evaluation, and for several micro-batches of one step; a backward may run for each, inside or after. A
    forward of the model after a change of subnet, autocast or grad mode packs anew. **Writes into weights inside are
    not seen** by packed layers, but are by those that are active as a whole, so that one forward may mix old and new
    weights: let optimisers step outside, or use :func:`pack_forwards`. A ``with`` inside another packs for itself.

    Args:
        model: holds the elastic layers.
        dtype: of the packed weights: float32, bfloat16 or float16; None: that of autocast where it is on, else that
            of each weight. What stays as it is without packing keeps its own: a model that has such layers computes
            under autocast.
        grad_mode: ``"autograd"``, or ``"main_grad"`` to add gradients in place; see
            :mod:`jdkd.experimental.packing` for what that bypasses.

    Yields:
        The model.

    Raises:
        InputError: on another mode or dtype, or if ``"main_grad"`` meets a weight that is no leaf.
    """
    packing = Packing(model, dtype, grad_mode, "packed")
    before = [(layer, layer._packing, layer._packed) for layer in packing.layers.values()]
    hook = model.register_forward_pre_hook(packing._pack_if_stale)
    try:
        for layer, _, _ in before:
            layer._packing, layer._packed = packing, None
        packing._pack()
        yield model
    finally:
        hook.remove()
        for layer, outer, part in before:
            ended = outer is not None and not outer.layers
            layer._packing, layer._packed = (None, None) if ended else (outer, part)
        packing.layers = {}  # of an end before that of a with inside, as of another thread's


def pack_forwards(model: nn.Module, *, dtype: torch.dtype | None = None, grad_mode: str = "autograd") -> PackedForwards:
    """Lets every forward of a model, from now on, pack the active weights of its elastic layers in one launch.

    For training: whatever wrote to the weights before a forward is seen by it, and nothing packed survives it but in
    its graph; only one that ends in a KeyboardInterrupt leaves it to the layers until the next forward. Layers called
    on their own use slices. Inside :func:`packed` nothing is packed for the forward. A copy of the model does not pack.

    Activation checkpointing inside the model is right: a recomputation packs the weight of each layer alone, and
    :func:`jdkd.nn.checkpoint` keeps the packed weights of the forward. Remove the handle after the backward.

    Args:
        model: holds the elastic layers; those that it has now are packed.
        dtype: as for :func:`packed`.
        grad_mode: as for :func:`packed`.

    Returns:
        A handle; its ``remove()`` ends it, as does leaving it as a ``with``.

    Raises:
        InputError: on another mode or dtype, or if a layer is packed already; from a forward, if ``"main_grad"`` meets
            a weight that is no leaf.
    """
    return PackedForwards(model, dtype, grad_mode)
