"""Operators that sum products: matrices, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from jdkd.graph.layout import Label, along, span
from jdkd.graph.rules.elementwise import met
from jdkd.graph.rules.registry import rule

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks


def _read(marks: Marks, one: Label | None, other: Label | None, operands: Sequence[Tensor], name: str) -> None:
    """The channels that a product sums over: those of an activation are coupled with a weight's."""
    there = [label for label in (one, other) if label is not None]
    if not there:
        return
    if all(marks.is_activation(operand) for operand in operands):
        marks.freeze(there, f"{name} multiplies activations with each other over it")
    elif len(there) == 1:
        marks.freeze(there, f"{name} sums it with what follows no channels")
    elif min(operand.dim() for operand in operands) == 1 and not any(map(marks.is_activation, operands)):
        marks.freeze(there, f"{name} takes a norm over it")  # of a weight, which would be another one after a cut
    else:
        marks.channels.couple(one.ravel(), other.ravel())
        first, second = there[::-1] if marks.is_activation(operands[1]) else there
        marks.channels.play(second, "in")
        if not any(marks.is_activation(operand) for operand in operands):  # a weight of low rank
            marks.channels.play(first, "out")


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "linear")
def _product(marks: Marks, call: Call) -> None:
    given, out = call.given, call.out
    names = {"aten::addmm": ("mat1", "mat2"), "aten::baddbmm": ("batch1", "batch2"), "aten::addmv": ("mat", "vec")}
    second = {"aten::mv": "vec", "aten::dot": "tensor", "aten::vdot": "other", "aten::linear": "weight"}
    first = "input" if call.name == "aten::linear" else "self"
    left, right = (given[name] for name in names.get(call.name, (first, second.get(call.name, "mat2"))))
    across = right.dim() - (1 if right.dim() == 1 or call.name == "aten::linear" else 2)
    summed_left, summed_right = marks.label(left, -1), marks.label(right, across)
    wide = [label for label in (summed_left, summed_right) if label is not None and len(span(label)) > 1]
    if wide:
        marks.freeze(wide, f"{call.name} sums channels that are spread over two dimensions")
    else:
        _read(marks, summed_left, summed_right, (left, right), call.name)
    kept = []
    for label in marks.layout(left):
        if label is not summed_left:
            kept.append(label[..., 0] if right.dim() == 1 else label)
    for label in marks.layout(right):
        if label is summed_right:
            continue
        if call.name == "aten::linear":
            label = along(label.ravel(), out.dim() - 1, out.dim())
        elif right.dim() == 1:
            continue
        partner = next((place for place, other in enumerate(kept) if span(other) & span(label)), None)
        if partner is not None:  # a batch of products, each with a weight of its own
            marks.channels.couple(kept[partner], label)
            continue
        kept.append(label)
        if not marks.is_activation(right):
            marks.channels.play(label, "out")
    if not marks.is_activation(left):
        for label in marks.layout(left):
            if label is not summed_left:
                marks.channels.play(label, "out")
    marks.set(out, tuple(kept))
    bias = given.get("bias") if call.name == "aten::linear" else given.get("self") if "add" in call.name else None
    if isinstance(bias, Tensor):
        met(marks, (out, bias), out, call.name)


@rule("convolution", "_convolution", "conv2d", "conv1d", "conv3d", "torchvision::deform_conv2d")
def _convolution(marks: Marks, call: Call) -> None:
    given, out = call.given, call.out
    feature, weight, bias = given["input"], given["weight"], given["bias"]
    groups = given["groups"]
    turned = bool(given.get("transposed"))
    for name in ("offset", "mask"):
        if isinstance(given.get(name), Tensor):
            marks.freeze(marks.layout(given[name]), f"{call.name} takes it as positions")
    others = [label for label in marks.layout(feature) if span(label) != {1}]
    marks.freeze(others, f"{call.name} slides over it")
    if marks.is_activation(weight):
        marks.freeze(marks.layout(weight), f"{call.name} takes it as a weight")
    channels = next((label.ravel() for label in marks.layout(feature) if span(label) == {1}), None)
    reads, makes = (marks.label(weight, dim) for dim in ((0, 1) if turned else (1, 0)))
    if any(label is not None and len(span(label)) > 1 for label in (reads, makes)):
        marks.freeze(marks.layout(weight), f"{call.name} has a weight that mixes its axes")
        return
    if groups == 1:
        _read(marks, channels, reads, (feature, weight), call.name)
    else:
        makes = _grouped(marks, channels, reads, makes, groups, turned, out.shape[1], call.name)
    if channels is not None and given.get("offset_groups", 1) > 1:  # each moves its channels alike, and stays as large
        parts = channels.reshape(given["offset_groups"], -1)
        marks.channels.couple(parts[:1], parts)
    result = None if makes is None else makes.ravel()
    if result is not None:
        marks.channels.play(result, "out")
        marks.set(out, (along(result, 1, out.dim()),))
        if isinstance(bias, Tensor) and (offsets := marks.label(bias, 0)) is not None:
            marks.channels.couple(result, offsets.ravel())


def _grouped(
    marks: Marks,
    channels: np.ndarray | None,
    reads: Label | None,
    makes: Label | None,
    groups: int,
    turned: bool,
    outputs: int,
    name: str,
) -> Label | None:
    """Whole groups of a grouped convolution go or stay: what one reads and makes is coupled."""
    inner = makes if turned else reads  # the axis of the weight that counts channels inside a group
    if inner is not None:
        marks.freeze([inner], f"{name} keeps the size of its groups")
    outer = reads if turned else makes
    if turned and outputs != groups:  # its outputs have no axis of their own in the weight
        marks.freeze([label for label in (channels, outer) if label is not None], f"{name} is grouped and transposed")
        return None
    if outer is None:
        return None
    per_group = outer.ravel().reshape(groups, -1)  # [groups, channels made by each]
    marks.channels.couple(per_group[:, :1], per_group)
    if channels is None:
        marks.freeze([outer], f"{name} reads what follows no channels")
    else:
        marks.channels.couple(per_group[:, :1], channels.reshape(groups, -1))
    return outer
