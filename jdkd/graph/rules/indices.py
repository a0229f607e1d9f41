"""Operators that pick, write or reduce along some dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jdkd.graph.layout import Label, along, span
from jdkd.graph.rules.elementwise import padded, pointwise
from jdkd.graph.rules.registry import outputs, rule

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks


def _index_dims(own: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[int], int] | None:
    """Which dimensions advanced indices replace, and by how many; None where they do not stand side by side."""
    taken, dim, result = [], 0, 0
    for index in indices:
        if index is None:
            dim += 1
            continue
        width = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        taken += range(dim, dim + width)
        result = max(result, 1 if index.dtype in (torch.bool, torch.uint8) else index.dim())
        dim += width
    side_by_side = taken == list(range(taken[0], taken[-1] + 1)) if taken else False
    return (taken, result) if side_by_side else None


def _without(label: Label, taken: Sequence[int], result: int) -> Label:
    """A label whose dimensions ``taken``, of size 1 in it, became ``result`` dimensions."""
    shape = list(label.shape)
    shape[taken[0] : taken[-1] + 1] = [1] * result
    return label.reshape(shape)


@rule("index")
def _indexed(marks: Marks, call: Call) -> None:
    own, indices = call.given["self"], call.given["indices"]
    for index in indices:
        if index is not None:
            marks.freeze(marks.layout(index), f"{call.name} takes it as an index")
    place, kept = _index_dims(own, indices), []
    for label in marks.layout(own):
        if place is None or span(label) & set(place[0]):
            marks.freeze([label], f"{call.name} picks some of its channels")
        else:
            kept.append(_without(label, *place))
    marks.set(call.out, tuple(kept))


@rule("index_put")
def _index_written(marks: Marks, call: Call) -> None:
    own, values, indices = (call.given[name] for name in ("self", "values", "indices"))
    place = _index_dims(own, indices)
    labels, written = marks.layout(own), marks.layout(values)
    picked = place is None or any(span(label) & set(place[0]) for label in labels)
    if picked or place[0][0] != 0:
        marks.freeze((*labels, *written), f"{call.name} writes to some of its channels")
        return
    taken, result = place
    written = padded(written, own.dim() - len(taken) + result)  # torch drops dimensions of size 1 that come first
    shape_back = [
        label.reshape((1,) * len(taken) + label.shape[result:])
        for label in written
        if not span(label) & {*range(result)}
    ]
    if not labels and own._is_view():
        marks.freeze(written, f"{call.name} writes into a part of a tensor")
        return
    if not labels:
        marks.set(own, tuple(shape_back))
        marks.set(call.out, tuple(shape_back))
        return
    for label in labels:
        partner = next((other for other in shape_back if span(other) == span(label)), None)
        if partner is None:
            marks.freeze([label], f"{call.name} writes what follows no channels to it")
        else:
            marks.channels.couple(label, partner)
    marks.set(call.out, labels)


@rule("index_select", "gather", "topk", "sort", "argsort", "_softmax", "_log_softmax", "cummax", "masked_select")
@rule("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std", "var_mean", "any", "all")
@rule(
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "median",
    "mode",
    "kthvalue",
    "nansum",
    "count_nonzero",
    "cumsum",
    "cumprod",
)
def _along_dims(marks: Marks, call: Call) -> None:
    """Channels along the dimensions that it runs over are mixed or picked; the others go on."""
    if "other" in call.given:  # the larger or smaller of two tensors
        pointwise(marks, call)
        return
    own = call.given["self"]
    dims = call.given.get("dim")
    taken = set(range(own.dim())) if dims in (None, []) else {d % own.dim() for d in np.atleast_1d(dims)}
    for tensor in call.tensors():
        if tensor is not own:
            marks.freeze(marks.layout(tensor), f"{call.name} takes it as an index")
    kept = [label for label in marks.layout(own) if not span(label) & taken]
    mixed = [label for label in marks.layout(own) if span(label) & taken]
    marks.freeze(mixed, f"{call.name} mixes its channels, or picks some by their values")
    for out in outputs(call):
        if out.dim() == own.dim():
            marks.set(out, tuple(kept))
        elif out.dim() == own.dim() - len(taken):
            marks.set(out, tuple(label.squeeze(tuple(taken)) for label in kept))


@rule("embedding")
def _embedded(marks: Marks, call: Call) -> None:
    """Rows of a table; which of them is data, what stands in them is made here."""
    table, rows = call.given["weight"], call.given["indices"]
    marks.freeze(marks.layout(rows), f"{call.name} takes it as an index")
    made = marks.label(table, 1)
    marks.freeze([label for label in marks.layout(table) if label is not made], f"{call.name} picks some of its rows")
    if made is not None:
        marks.channels.play(made, "out")
        marks.set(call.out, (along(made.ravel(), call.out.dim() - 1, call.out.dim()),))
