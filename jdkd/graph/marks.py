"""Which tensor holds which channels along which axis, while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
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


class Running:
    """A module whose forward has begun.

    Args:
        path: of the module.
        first: its first input, if that is a tensor.
        into: where channels stand in it.
    """

    def __init__(self, path: str, first: Tensor | None, into: Layout) -> None:
        self.path, self.input, self.into = path, first, into
        self.stream = [] if first is None else [first]  # its input, and every sum of it with something
        self.ends: list[tuple[str, ...]] = []  # for each, what made the other term


class Marks:
    """Labels of tensors, as rules read and write them.

    Args:
        model: whose parameters and buffers the channels belong to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.channels = Channels()
        self.unknown: dict[str, set[str]] = {}  # operator -> paths of the modules that it was seen in
        self.running: list[Running] = []  # the modules whose forward has begun, outermost first
        self._root = type(model).__name__
        self._layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._activations: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)

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

    def activate(self, values: Any) -> None:
        """Notes that these tensors were computed from the example."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._activations[tensor] = True

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the example, and not from parameters alone."""
        return tensor in self._activations

    def freeze(self, labels: Layout | list[Label], why: str, remedy: str = "") -> None:
        """Keeps channels as they are; the reason names the module that was running, and what would free them."""
        for label in labels:
            self.channels.freeze(label, f"{why} in {self.where}{remedy and f'; {remedy}'}")

    @property
    def where(self) -> str:
        """The path of the module that is running."""
        return (self.running[-1].path if self.running else "") or self._root
