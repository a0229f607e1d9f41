"""What follows a convolution in the code of a module, and the same code with it in one pass: see :func:`flow_of`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from jdkd.errors import InputError, said
from jdkd.latency.folding import is_hooked, is_plain
from jdkd.patch.convolutions import Convolution
from jdkd.patch.overrides import Override

IN_PLACE = {operator.iadd, "add_"}
ADDS = {operator.add, torch.add, "add", *IN_PLACE}
RECTIFIES = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
KEPT = ("placeholder", "output", "call_module")


class _OneLevel(fx.Tracer):
    """Follows the code of one module, and none of its children's."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def flow_of(module: nn.Module) -> fx.Graph | None:
    """How the children of a module feed each other, where that is all that its code does but to add and rectify.

    Args:
        module: has a convolution among its children; its forward runs once on symbols.

    Returns:
        The graph; None where the code does anything else, which might change from call to call.

    Raises:
        InputError: the code cannot be followed, with what it raised.
    """
    if not any(type(child) is nn.Conv2d for child in module.children()) or isinstance(module, fx.GraphModule):
        return None
    try:
        graph = _OneLevel().trace(module)
    except Exception as error:  # whatever a forward raises on symbols
        raise InputError(f"its code cannot be followed: {said(error)}") from error
    return graph if all(_is_followed(node) for node in graph.nodes) else None


def _is_followed(node: fx.Node) -> bool:
    if node.op in KEPT:
        return node.op != "call_module" or (len(node.args) == 1 and not node.kwargs)
    numbers = [arg for arg in node.args if not isinstance(arg, fx.Node)]
    if node.target in ADDS:
        return len(node.args) == 2 and not numbers and not node.kwargs
    return node.target in RECTIFIES and len(node.args) == 1 and not (set(node.kwargs) - {"inplace"})


class Fused(Override):
    """The code of a module, with what follows its convolutions in one pass.

    Args:
        module: as :func:`flow_of` has followed it.
        graph: what that returned.
        convolutions: of all of the model, by the identity of the module.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, convolutions: Mapping[int, Convolution]) -> None:
        super().__init__(module)
        changed, steps = copy.deepcopy(graph), {}
        for node in list(changed.nodes):
            if (convolution := convolutions.get(id(self._child(node)))) is not None:
                self._join(changed, node, convolution, steps)
        self.steps = len(steps)
        """Convolutions that something was joined to."""
        names = {node.target for node in changed.nodes if node.op == "call_module"}
        self._children = list(module.children())
        self._code = fx.GraphModule(
            steps | {name: module.get_submodule(name) for name in names - steps.keys()}, changed
        )

    def run(self, *args: Any, **named: Any) -> Any:
        return (self.inner if any(map(is_hooked, self._children)) else self._code.forward)(*args, **named)

    def _join(self, graph: fx.Graph, node: fx.Node, convolution: Convolution, steps: dict[str, nn.Module]) -> None:
        """Replaces a convolution and what follows it by one step."""
        chain, residual, rectified = [node], None, False
        if convolution.norm is not None:
            after = _only_user(node)
            if after is None or self._child(after) is not convolution.norm:
                return
            chain.append(after)
        if (added := _only_user(chain[-1])) is not None and added.target in ADDS:
            first, second = added.args
            if first is not second and (first is chain[-1] or added.target not in IN_PLACE):
                residual = second if first is chain[-1] else first
                chain.append(added)
        if (after := _only_user(chain[-1])) is not None and self._rectifies(after):
            chain.append(after)
            rectified = True
        if residual is None and not rectified:
            return
        convolution.form = replace(convolution.form, fused=True)
        name = f"joined_{len(steps)}"
        steps[name] = _Step(convolution, rectified)
        with graph.inserting_after(chain[-1]):
            step = graph.call_module(name, (node.args[0],) if residual is None else (node.args[0], residual))
        chain[-1].replace_all_uses_with(step)
        for each in reversed(chain):
            graph.erase_node(each)

    def _child(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def _rectifies(self, node: fx.Node) -> bool:
        child = self._child(node)
        return node.target in RECTIFIES if child is None else type(child) is nn.ReLU and is_plain(child)


class _Step(nn.Module):
    """A convolution with what follows it."""

    def __init__(self, convolution: Convolution, relu: bool) -> None:
        super().__init__()
        self._run, self._relu = convolution.run, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._run(x, residual, self._relu)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None
