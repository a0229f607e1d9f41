"""Which modules add to what they were given, and which layers' outputs they add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from jdkd.graph.layout import Layout
from jdkd.graph.marks import Call, Marks, Running

_SUMS = ("aten::add", "aten::add_")
_NEAREST = 3  # makers of a tensor that are remembered: a scale, its norm, and the layer before


class Step(NamedTuple):
    """The forward of a module that returned its input's shape.

    Args:
        path: of the module.
        into, out: where channels stood in its input and its output.
        ends: for every sum with its input, what made the other term: layers and parameters by their names in the model,
            the nearest to the sum first, parameters that are added and not multiplied with a ``+`` before their name;
            empty where it added nothing.
    """

    path: str
    into: Layout
    out: Layout
    ends: tuple[tuple[str, ...], ...]


class Residuals:
    """Follows, through one forward, what is added to the inputs of the modules that run."""

    def __init__(self, model: nn.Module, marks: Marks) -> None:
        self.steps: list[Step] = []
        self._marks = marks
        self._parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters and views of them -> name
        for name, parameter in model.named_parameters():
            self._parameters[parameter] = name
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> what made it, the nearest first

    def saw(self, call: Call) -> None:
        """An operator ran."""
        tensors = list(call.tensors())
        activations = [tensor for tensor in tensors if self._marks.is_activation(tensor)]
        outs = [call.out] if isinstance(call.out, Tensor) else []
        if call.name in _SUMS:
            for running in self._marks.running:
                own = [t for t in activations if any(t is member for member in running.stream)]
                if own and outs:
                    added = [tensor for tensor in activations if not any(tensor is member for member in own)]
                    running.ends += [self._made.get(tensor, ()) for tensor in added]
                    running.stream.append(outs[0])
        offset = (
            call.given.get("bias") if "bias" in call.given else call.given.get("self") if "add" in call.name else None
        )
        named = [
            f"+{self._parameters[tensor]}" if tensor is offset or call.name in _SUMS else self._parameters[tensor]
            for tensor in tensors
            if tensor in self._parameters
        ]
        for out in outs:
            if len(activations) == 1:
                self._made[out] = (*named, *self._made.get(activations[0], ()))[:_NEAREST]
            elif len(tensors) == len(named) == 1:
                self._parameters[out] = named[0]

    def left(self, path: str, module: nn.Module, running: Running, out: object) -> None:
        """A module's forward has ended."""
        if not isinstance(out, Tensor):
            return
        if not any(True for _ in module.children()) and any(True for _ in _own(module)):
            before = () if running.input is None else self._made.get(running.input, ())
            self._made[out] = (path, *before)[:_NEAREST]
        elif running.input is not None and out.shape == running.input.shape and any(True for _ in module.children()):
            self.steps.append(Step(path, running.into, self._marks.layout(out), tuple(running.ends)))


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
