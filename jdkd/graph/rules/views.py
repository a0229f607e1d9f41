"""Operators that move whole slices, and do not look at values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jdkd.graph.layout import Label, along, reshaped, span
from jdkd.graph.rules.registry import outputs, rule

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze")
def _view(marks: Marks, call: Call) -> None:
    source, kept = call.given["self"], []
    for label in marks.layout(source):
        moved = reshaped(label, source.shape, call.out.shape)
        if moved is None:
            marks.freeze([label], f"{call.name} folds its channels into {tuple(call.out.shape)}")
            continue
        kept.append(moved)
        if len(span(moved)) > len(span(label)):  # split into equal parts, which stay as many: each loses the same
            whole = moved.reshape([size for size in moved.shape if size > 1])
            marks.channels.couple(whole.reshape(-1, whole.shape[-1])[:1], whole.reshape(-1, whole.shape[-1]))
    joined = [label for label in kept if any(other is not label and span(other) & span(label) for other in kept)]
    marks.freeze(joined, f"{call.name} folds two kinds of channels into one dimension")
    marks.set(call.out, tuple(label for label in kept if not any(label is other for other in joined)))


def _by_index(name: str, function: Callable[[Label, dict[str, Any], torch.Size], Any]) -> None:
    """Registers an operator that moves whole slices: the same is done to every label."""

    def moved(marks: Marks, call: Call) -> None:
        source = call.given["self"]
        layout = marks.layout(source)
        results = [function(label, call.given, source.shape) for label in layout]
        if name in ("split", "unsafe_split"):  # into equal parts, whatever the size: each loses the same
            for parts in results:
                _stay_equal(marks, parts, call.name)
        for place, out in enumerate(outputs(call)):
            marks.set(out, tuple(result if isinstance(result, np.ndarray) else result[place] for result in results))

    rule(name)(moved)


def _stay_equal(marks: Marks, parts: list[Label], name: str) -> None:
    """Parts of one size lose the same, so that they are of one size again; where one is smaller nothing may go."""
    if any(part.shape != parts[0].shape for part in parts):
        marks.freeze(parts, f"{name} splits it into parts of two sizes")
    else:
        for part in parts[1:]:
            marks.channels.couple(parts[0], part)


def _transposed(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    return np.swapaxes(label, given["dim0"], given["dim1"])


def _split(label: Label, given: dict[str, Any], shape: torch.Size) -> list[Label]:
    dim, size = given["dim"] % len(shape), given.get("split_size", given.get("split_sizes"))
    sizes = [size] * -(-shape[dim] // size) if isinstance(size, int) else list(size)
    if label.shape[dim] == 1:
        return [label] * len(sizes)
    return np.split(label, np.cumsum(sizes)[:-1], axis=dim)


def _unbound(label: Label, given: dict[str, Any], shape: torch.Size) -> list[Label]:
    dim = given["dim"] % len(shape)
    return [label.take(k if label.shape[dim] > 1 else 0, axis=dim) for k in range(shape[dim])]


def _selected(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    dim = given["dim"]
    return label.take(given["index"] if label.shape[dim] > 1 else 0, axis=dim)


def _sliced(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    dim = given["dim"] % len(shape)
    if label.shape[dim] == 1:
        return label
    end = given.get("end")
    part = slice(given.get("start"), None if end is None or end > shape[dim] else end, given.get("step", 1))
    return label[(slice(None),) * dim + (part,)]


def _expanded(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    return label.reshape((1,) * (len(given["size"]) - label.ndim) + label.shape)


def _flipped(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    return np.flip(label, axis=tuple(given["dims"]))


def _rolled(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    dims = given["dims"] or [0]
    return np.roll(label, [s if label.shape[d] > 1 else 0 for s, d in zip(given["shifts"], dims, strict=True)], dims)


def _tiled(label: Label, given: dict[str, Any], shape: torch.Size) -> Label:
    repeats = given["repeats"]
    label = label.reshape((1,) * (len(repeats) - label.ndim) + label.shape)
    return np.tile(label, [count if size > 1 else 1 for count, size in zip(repeats, label.shape, strict=True)])


_by_index("permute", lambda label, given, shape: label.transpose(tuple(given["dims"])))
_by_index("transpose", _transposed)
_by_index("t", lambda label, given, shape: label.T)
_by_index("split", _split)
_by_index("unsafe_split", _split)
_by_index("split_with_sizes", _split)
_by_index("unsafe_split_with_sizes", _split)
_by_index("unbind", _unbound)
_by_index("select", _selected)
_by_index("slice", _sliced)
_by_index("expand", _expanded)
_by_index("flip", _flipped)
_by_index("roll", _rolled)
_by_index("repeat", _tiled)


@rule("cat", "stack")
def _concatenated(marks: Marks, call: Call) -> None:
    tensors, out = [t for t in call.given["tensors"] if t.dim() or call.name == "aten::stack"], call.out
    dim = call.given["dim"] % out.dim()
    if call.name == "aten::stack":
        layouts = [tuple(np.expand_dims(label, dim) for label in marks.layout(tensor)) for tensor in tensors]
        sizes = [1] * len(tensors)
    else:
        tensors = [tensor for tensor in tensors if tensor.shape != (0,)]  # old code starts a list with one of these
        layouts, sizes = [marks.layout(tensor) for tensor in tensors], [tensor.shape[dim] for tensor in tensors]
    pieces = [next((label for label in layout if dim in span(label)), None) for layout in layouts]
    kept = []
    if any(piece is not None for piece in pieces):
        if all(piece is None or span(piece) == {dim} for piece in pieces):
            why = f"{call.name} joins it with what follows no channels, in {marks.where}"
            ravelled = [
                marks.channels.constant(size, why) if piece is None else piece.ravel()
                for piece, size in zip(pieces, sizes, strict=True)
            ]
            kept.append(along(np.concatenate(ravelled), dim, out.dim()))
        else:
            marks.freeze(
                [piece for piece in pieces if piece is not None],
                f"{call.name} joins channels that are spread over two dimensions",
            )
    across = [[label for label in layout if dim not in span(label)] for layout in layouts]
    for place in sorted({place for labels in across for label in labels for place in span(label)}):
        met = [next((label for label in labels if place in span(label)), None) for labels in across]
        there = [label for label in met if label is not None]
        for other in there[1:]:
            marks.channels.couple(there[0], other)
        if any(
            label is None and tensor.shape[dim] and tensor.numel() for label, tensor in zip(met, tensors, strict=True)
        ):
            marks.freeze(there, f"{call.name} joins it with what follows no channels")
        if not any(other is there[0] for other in kept):
            kept.append(there[0])
    marks.set(out, tuple(kept))


@rule("channel_shuffle", "native_channel_shuffle")
def _shuffled(marks: Marks, call: Call) -> None:
    """Channels ``[groups, C / groups]`` are transposed; every group loses the same, so that it stays a group."""
    label = marks.label(call.given["self"], 1)
    if label is not None:
        parts = label.reshape(call.given["groups"], -1)
        marks.channels.couple(parts[:1], parts)
        marks.set(call.out, (along(parts.T.ravel(), 1, call.out.dim()),))


@rule("glu")
def _gated(marks: Marks, call: Call) -> None:
    """One half of the channels times a gate from the other."""
    source, kept = call.given["self"], []
    dim = call.given["dim"] % source.dim()
    for label in marks.layout(source):
        if label.shape[dim] > 1:
            label, gates = np.split(label, 2, axis=dim)
            marks.channels.couple(label, gates)
        kept.append(label)
    marks.set(call.out, tuple(kept))


@rule("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im")
def _folded(marks: Marks, call: Call) -> None:
    """Runs of channels become positions of one channel, or the positions of every channel a run of channels."""
    source, out = call.given["self"], call.out
    here = source.dim() - (2 if call.name == "aten::col2im" else 3)
    there = out.dim() - (2 if call.name == "aten::im2col" else 3)
    others = [label for label in marks.layout(source) if span(label) != {here}]
    marks.freeze(others, f"{call.name} moves its places")
    label = marks.label(source, here)
    if label is None or len(span(label)) > 1:
        return
    label = label.ravel()
    if out.shape[there] > source.shape[here]:
        label = np.repeat(label, out.shape[there] // source.shape[here])
    else:
        runs = label.reshape(out.shape[there], -1)
        marks.channels.couple(runs[:, :1], runs)
        label = runs[:, 0]
    marks.set(out, (along(label, there, out.dim()),))
