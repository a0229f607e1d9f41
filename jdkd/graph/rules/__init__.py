"""What each ATen operator does to the channels of its tensors.

A rule gets the marks and one call. Where an operator mixes channels in a way that a cut would change (a mean over
them, a softmax), or where there is no rule for it at all, the channels are frozen, with the operator as the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jdkd.graph.layout import fits
from jdkd.graph.rules import indices, layers, products, views  # noqa: F401 - they register their rules
from jdkd.graph.rules.elementwise import pointwise, same
from jdkd.graph.rules.layers import spatial
from jdkd.graph.rules.registry import RULES, outputs, rule, unknown

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks

__all__ = ["KINDS", "apply", "rule"]

KINDS = {"pointwise": pointwise, "spatial": spatial, "same": same}  # what a declaration may call an operator


def apply(marks: Marks, call: Call, declared: Mapping[str, str]) -> None:
    """Brings the channels of a call's inputs to its outputs, by what is declared of its operator or by its rule."""
    if not any(marks.layout(tensor) for tensor in call.tensors()):
        return
    found = (
        KINDS.get(declared.get(call.name, "")) or RULES.get(call.name) or RULES.get(call.name.removesuffix("_"))
    )  # the same in place
    found = found or (pointwise if call.pointwise else unknown)
    try:
        found(marks, call)
        understood = all(fits(label, out.shape) for out in outputs(call) for label in marks.layout(out))
    except (ValueError, IndexError, KeyError, TypeError):  # a form of the operator that its rule did not foresee
        understood = False
    if not understood:
        for out in outputs(call):
            marks.set(out, ())
        unknown(marks, call)
