"""One eager forward, watched operator by operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jdkd.graph.marks import Call, Marks, Running
from jdkd.graph.residuals import Residuals
from jdkd.graph.rules import apply


class Tracer(TorchDispatchMode):
    """Watches a model's forward; the rules say what each operator does to the channels.

    Args:
        model: what will run.
        declared: what operators do to channels, before their rules are asked.
        follow: path of the module whose feature maps are followed.
    """

    def __init__(self, model: nn.Module, declared: Mapping[str, str], follow: str | None = None) -> None:
        super().__init__()
        self.follow = follow
        self.followed: list[np.ndarray] = []  # numbers of the channels of each map [N, C, H, W] that it returned
        self.declared = declared
        self.model, self.marks = model, Marks(model)
        self.residuals = Residuals(model, self.marks)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        call = Call(schema.name, given, out, _is_pointwise(func))
        apply(self.marks, call, self.declared)
        if any(self.marks.is_activation(tensor) for tensor in call.tensors()):
            self.marks.activate(out)
        self.residuals.saw(call)
        return out

    def run(self, example: tuple[Any, ...]) -> None:
        """Runs the model on the example, and freezes what it returns."""
        self.marks.activate(example)
        with torch.no_grad(), self._watched(), self:
            out = self.model(*example)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                for label in self.marks.layout(tensor):
                    self.marks.channels.freeze(label, "the model returns it")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles = []
        for path, module in self.model.named_modules():
            entered, left = self._hooks(path)
            handles += [module.register_forward_pre_hook(entered, prepend=True), module.register_forward_hook(left)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, path: str) -> tuple[Any, Any]:
        def entered(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            self.marks.running.append(Running(path, first, () if first is None else self.marks.layout(first)))

        def left(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            self.residuals.left(path, module, self.marks.running.pop(), out)
            if path == self.follow:
                maps = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.dim() == 4]
                labels = [self.marks.label(tensor, 1) for tensor in maps]
                self.followed += [np.empty(0, np.int64) if label is None else label.ravel() for label in labels]

        return entered, left


@lru_cache(maxsize=1024)
def _is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Whether an operator, or the one that it does in place, is marked as working element by element."""
    namespace, _, name = func._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), func.overloadpacket)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in (func, *overloads))
