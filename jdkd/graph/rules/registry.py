"""Which rule an operator has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks

Rule = Callable[["Marks", "Call"], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some operators, by their names in ATen or as ``namespace::name``."""

    def register(function: Rule) -> Rule:
        RULES.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def unknown(marks: Marks, call: Call) -> None:
    """Freezes whatever goes into an operator that there is no rule for."""
    marks.unknown.setdefault(call.name, set()).add(marks.where)
    for tensor in call.tensors():
        marks.freeze(
            marks.layout(tensor),
            f"{call.name} is not an operator that is known",
            f"jdkd.graph.Declaration(operators={{{call.name!r}: ...}}) can say what it does",
        )


def outputs(call: Call) -> list[Tensor]:
    """The tensors that a call returned, in order."""
    return [call.out] if isinstance(call.out, Tensor) else [out for out in call.out if isinstance(out, Tensor)]
