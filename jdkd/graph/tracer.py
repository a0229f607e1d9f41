"""One eager forward, watched operator by operator: which tensor holds which channels along which axis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from jdkd.graph.channels import Channels
from jdkd.graph.layout import Label, Layout, along, span


class Call(NamedTuple):
    """One operator as it ran.

    Args:
        name: ``"aten::convolution"`` and the like, without the overload.
        given: its arguments by the names of its schema, defaults included.
        out: what it returned.
        pointwise: whether it is marked as computing every element from those at the same place.
    """

    name: str
    given: dict[str, Any]
    out: Any
    pointwise: bool

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it was given, in order."""
        return (leaf for leaf in tree_leaves(self.given) if isinstance(leaf, Tensor))


class Step(NamedTuple):
    """A module's forward: where its channels came in and went out, and whether its input was added to something."""

    path: str
    into: Layout
    out: Layout
    shape: torch.Size
    residual: bool


class Tracer(TorchDispatchMode):
    """Watches a model's forward; ``rules`` say what each operator does to the channels.

    Args:
        model: what will run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.channels = Channels()
        self.steps: list[Step] = []
        self.unknown: dict[str, set[str]] = {}  # operator -> paths of the modules that it was seen in
        self._layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._activations: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)
        self._stack: list[_Running] = []

    # -- what rules use -----------------------------------------------------------------------------------------------

    def layout(self, tensor: Tensor) -> Layout:
        """A tensor's labels; those of a parameter or buffer are made when it is first seen."""
        if tensor not in self._layouts:
            name = self._names.get(id(tensor))
            self._layouts[tensor] = () if name is None else tuple(
                along(self.channels.axis(name, dim, size), dim, tensor.dim())
                for dim, size in enumerate(tensor.shape)
                if size > 1
            )  # fmt: skip
        return self._layouts[tensor]

    def label(self, tensor: Tensor, dim: int) -> Label | None:
        """The label along one dimension, if there is one."""
        dim %= max(tensor.dim(), 1)
        return next((label for label in self.layout(tensor) if dim in span(label)), None)

    def set(self, tensor: Tensor, layout: Layout) -> None:
        """Says where a tensor holds channels."""
        self._layouts[tensor] = tuple(label for label in layout if span(label))

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the example, and not from parameters alone."""
        return tensor in self._activations

    def freeze(self, labels: Layout | list[Label], why: str) -> None:
        """Keeps channels as they are; the reason names the module that was running."""
        for label in labels:
            self.channels.freeze(label, f"{why} in {self.where}")

    @property
    def where(self) -> str:
        """The path of the module that is running."""
        return (self._stack[-1].path if self._stack else "") or type(self.model).__name__

    def added(self, operands: list[Tensor]) -> None:
        """Marks the modules that are running whose own input is among the operands of a sum."""
        for running in self._stack:
            running.residual |= any(operand is running.input for operand in operands)

    # -- watching -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from jdkd.graph.rules import apply

        out = func(*args, **(kwargs or {}))
        schema = func._schema
        given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        apply(self, Call(schema.name, given, out, _is_pointwise(func)))
        if any(self.is_activation(tensor) for tensor in tree_leaves(given) if isinstance(tensor, Tensor)):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._activations[tensor] = True
        return out

    def run(self, example: tuple[Any, ...]) -> Any:
        """Runs the model on the example, and freezes what it returns."""
        for tensor in tree_leaves(example):
            if isinstance(tensor, Tensor):
                self._activations[tensor] = True
        with torch.no_grad(), self._watched(), self:
            out = self.model(*example)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                for label in self.layout(tensor):
                    self.channels.freeze(label, "the model returns it")
        return out

    @contextmanager
    def _watched(self) -> Iterator[None]:
        paths = {module: path for path, module in self.model.named_modules()}
        handles = []
        for module in paths:
            handles.append(module.register_forward_pre_hook(lambda m, i: self._enter(paths[m], i), prepend=True))
            handles.append(module.register_forward_hook(lambda m, i, out: self._leave(m, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, inputs: tuple[Any, ...]) -> None:
        first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        self._stack.append(_Running(path, first, () if first is None else self.layout(first)))

    def _leave(self, module: nn.Module, out: Any) -> None:
        running = self._stack.pop()
        composite = any(True for _ in module.children())
        if composite and running.input is not None and isinstance(out, Tensor) and out.shape == running.input.shape:
            step = Step(running.path, running.into, self.layout(out), out.shape, running.residual)
            self.steps.append(step)


class _Running:
    """A module whose forward has begun."""

    def __init__(self, path: str, first: Tensor | None, into: Layout) -> None:
        self.path, self.input, self.into, self.residual = path, first, into, False


@lru_cache(maxsize=1024)
def _is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Whether an operator, or the one that it does in place, is marked as working element by element."""
    namespace, _, name = func._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), func.overloadpacket)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in (func, *overloads))
