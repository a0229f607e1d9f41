"""Operators that compute every element from those at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from jdkd.graph.layout import Layout, condensed, span
from jdkd.graph.rules.registry import outputs, rule, unknown

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks


def pointwise(marks: Marks, call: Call) -> None:
    (out, *others), operands = outputs(call), list(call.tensors())
    met(marks, operands, out, call.name)
    for other in others:
        marks.set(other, marks.layout(out))


def met(marks: Marks, operands: Sequence[Tensor], out: Tensor, name: str) -> None:
    """Couples what stands at the same place of tensors that broadcast to ``out``, and labels it."""
    ndim, met = out.dim(), []
    one_weight = not any(marks.is_activation(operand) for operand in operands)
    for operand in operands:
        for label in padded(marks.layout(operand), ndim):
            for partner in [other for other in met if span(other) & span(label)]:
                marks.channels.couple(partner, label, one_weight=one_weight)
                met = [other for other in met if other is not partner]
                if span(label) >= span(partner):  # all are coupled; the shorter one says it
                    label = condensed(partner)
            met.append(label)
    for operand in operands:  # what has this size and no channels would not shrink with them
        labelled = frozenset().union(*(span(label) for label in marks.layout(operand)))
        for dim, size in enumerate(operand.shape):
            place = ndim - operand.dim() + dim
            if size > 1 and dim not in labelled and operand.stride(dim):  # what was expanded follows the others
                stuck = [label for label in met if place in span(label)]
                marks.freeze(
                    stuck,
                    f"{name} meets a tensor of {size} values that follow no channels",
                    "if there is one for each channel, make it a parameter or buffer of the model",
                )
    if out.dim() and _written_in_part(marks, out, operands):
        marks.freeze(met, f"{name} writes into a part of a tensor")
        return
    marks.set(out, tuple(met))


def _written_in_part(marks: Marks, out: Tensor, operands: Sequence[Tensor]) -> bool:
    """Whether an operator in place gave channels to a view of a tensor that has none."""
    return out._is_view() and any(out is operand for operand in operands) and not marks.layout(out)


@rule("hardswish", "hardsigmoid", "rrelu_with_noise", "_prelu_kernel")
def _untagged(marks: Marks, call: Call) -> None:
    """Elementwise, and not marked so."""
    pointwise(marks, call)


@rule("copy")
def _copy(marks: Marks, call: Call) -> None:
    own, source = call.given["self"], call.given["src"]
    if marks.layout(own) or own._is_view():
        met(marks, (own, source), call.out, call.name)
    else:  # fresh memory takes over what is written to it
        marks.set(own, padded(marks.layout(source), own.dim()))


def padded(layout: Layout, ndim: int) -> Layout:
    """Labels of a tensor as it broadcasts to ``ndim`` dimensions."""
    return tuple(label.reshape((1,) * (ndim - label.ndim) + label.shape) for label in layout)


@rule(
    "alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "dropout", "native_dropout"
)
@rule("bernoulli", "_conj", "resolve_conj", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like")
@rule("to_dense", "to_mkldnn", "view_of", "lift")
def same(marks: Marks, call: Call) -> None:
    source = next(call.tensors())
    for out in outputs(call):
        if out.shape == source.shape:
            marks.set(out, marks.layout(source))


@rule("as_strided_", "set_", "resize_")
def _laid_out(marks: Marks, call: Call) -> None:
    """Changes strides; channels stay where the shape stays."""
    own = call.given["self"]
    if any(size not in (1, own.shape[dim]) for label in marks.layout(own) for dim, size in enumerate(label.shape)):
        unknown(marks, call)


@rule("sym_size", "sym_stride", "sym_numel", "is_same_size", "new_zeros", "new_ones", "new_empty", "new_full")
@rule("new_empty_strided")
def _nothing(marks: Marks, call: Call) -> None:
    """Asks for a shape or a dtype."""


@rule("nonzero", "_local_scalar_dense", "equal", "is_nonzero", "_unique2", "bincount", "torchvision::nms")
def _data_read(marks: Marks, call: Call) -> None:
    for tensor in call.tensors():
        marks.freeze(marks.layout(tensor), f"{call.name} makes decisions by its values")
