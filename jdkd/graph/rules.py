"""What each ATen operator does to the channels of its tensors.

A rule gets the tracer and one call. Where an operator mixes channels in a way that a cut would change (a mean over
them, a softmax), or where there is no rule for it at all, the channels are frozen, with the operator as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jdkd.graph.layout import Label, Layout, along, condensed, reshaped, span

if TYPE_CHECKING:
    from jdkd.graph.tracer import Call, Tracer

Rule = Callable[["Tracer", "Call"], None]
_RULES: dict[str, Rule] = {}


def apply(tracer: Tracer, call: Call) -> None:
    """Brings the channels of a call's inputs to its outputs."""
    labelled = [tensor for tensor in call.tensors() if tracer.layout(tensor)]
    if not labelled:
        return
    rule = _RULES.get(call.name)
    if rule is None and call.name.endswith("_"):  # the same in place
        rule = _RULES.get(call.name.removesuffix("_"))
    if rule is None:
        rule = _pointwise if call.pointwise else _unknown
    rule(tracer, call)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some operators, by their names in ATen."""

    def register(function: Rule) -> Rule:
        _RULES.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def _unknown(tracer: Tracer, call: Call) -> None:
    tracer.unknown.setdefault(call.name, set()).add(tracer.where)
    for tensor in call.tensors():
        tracer.freeze(tracer.layout(tensor), f"{call.name} is not an operator that is known")


def _outputs(call: Call) -> list[Tensor]:
    return [call.out] if isinstance(call.out, Tensor) else [out for out in call.out if isinstance(out, Tensor)]


# -- elementwise ------------------------------------------------------------------------------------------------------


def _pointwise(tracer: Tracer, call: Call) -> None:
    (out, *others), operands = _outputs(call), list(call.tensors())
    _met(tracer, operands, out, call.name)
    for other in others:
        tracer.set(other, tracer.layout(out))
    if call.name in ("aten::add", "aten::add_"):
        tracer.added(operands)


def _met(tracer: Tracer, operands: Sequence[Tensor], out: Tensor, name: str) -> None:
    """Couples what stands at the same place of tensors that broadcast to ``out``, and labels it."""
    ndim, met = out.dim(), []
    for operand in operands:
        for label in tracer.layout(operand):
            label = label.reshape((1,) * (ndim - label.ndim) + label.shape)
            partner = next((place for place, other in enumerate(met) if span(other) & span(label)), None)
            if partner is None:
                met.append(label)
                continue
            tracer.channels.couple(met[partner], label)
            met[partner] = condensed(min(np.broadcast_arrays(met[partner], label)[0], label, key=lambda x: x.size))
    for operand in operands:  # what has this size and no channels would not shrink with them
        labelled = frozenset().union(*(span(label) for label in tracer.layout(operand)))
        for dim, size in enumerate(operand.shape):
            place = ndim - operand.dim() + dim
            if size > 1 and dim not in labelled:
                stuck = [label for label in met if place in span(label)]
                tracer.freeze(stuck, f"{name} meets a tensor of {size} values that follow no channels")
    if out.dim() and _written_in_part(tracer, out, operands):
        tracer.freeze(met, f"{name} writes into a part of a tensor")
        return
    tracer.set(out, tuple(met))


def _written_in_part(tracer: Tracer, out: Tensor, operands: Sequence[Tensor]) -> bool:
    """Whether an operator in place gave channels to a view of a tensor that has none."""
    return out._is_view() and any(out is operand for operand in operands) and not tracer.layout(out)


@rule("hardswish", "hardsigmoid", "rrelu_with_noise", "_prelu_kernel")
def _untagged(tracer: Tracer, call: Call) -> None:
    """Elementwise, and not marked so."""
    _pointwise(tracer, call)


@rule("copy")
def _copy(tracer: Tracer, call: Call) -> None:
    own, source = call.given["self"], call.given["src"]
    if tracer.layout(own) or own._is_view():
        _met(tracer, (own, source), call.out, call.name)
    else:  # fresh memory takes over what is written to it
        tracer.set(own, _padded(tracer.layout(source), own.dim()))


def _padded(layout: Layout, ndim: int) -> Layout:
    return tuple(label.reshape((1,) * (ndim - label.ndim) + label.shape) for label in layout)


@rule(
    "alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "dropout", "native_dropout"
)
@rule("bernoulli", "_conj", "resolve_conj", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like")
@rule("cumsum", "to_dense", "to_mkldnn", "view_of", "lift")
def _same(tracer: Tracer, call: Call) -> None:
    source = next(call.tensors())
    for out in _outputs(call):
        if out.shape == source.shape:
            tracer.set(out, tracer.layout(source))


@rule("as_strided_", "set_", "resize_")
def _laid_out(tracer: Tracer, call: Call) -> None:
    """Changes strides; channels stay where the shape stays."""
    own = call.given["self"]
    if any(size not in (1, own.shape[dim]) for label in tracer.layout(own) for dim, size in enumerate(label.shape)):
        _unknown(tracer, call)


@rule("sym_size", "sym_stride", "sym_numel", "is_same_size", "new_zeros", "new_ones", "new_empty", "new_full")
@rule("new_empty_strided")
def _nothing(tracer: Tracer, call: Call) -> None:
    """Asks for a shape or a dtype."""


@rule("nonzero", "_local_scalar_dense", "equal", "is_nonzero", "_unique2", "bincount", "torchvision::nms")
def _data_read(tracer: Tracer, call: Call) -> None:
    for tensor in call.tensors():
        tracer.freeze(tracer.layout(tensor), f"{call.name} makes decisions by its values")


# -- views ------------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze")
def _view(tracer: Tracer, call: Call) -> None:
    source, kept = call.given["self"], []
    for label in tracer.layout(source):
        moved = reshaped(label, source.shape, call.out.shape)
        if moved is None:
            tracer.freeze([label], f"{call.name} folds its channels into {tuple(call.out.shape)}")
            continue
        kept.append(moved)
        if len(span(moved)) > len(span(label)):  # split into equal parts, which stay as many: each loses the same
            whole = moved.reshape([size for size in moved.shape if size > 1])
            tracer.channels.couple(whole.reshape(-1, whole.shape[-1])[:1], whole.reshape(-1, whole.shape[-1]))
    joined = [label for label in kept if any(other is not label and span(other) & span(label) for other in kept)]
    tracer.freeze(joined, f"{call.name} folds two kinds of channels into one dimension")
    tracer.set(call.out, tuple(label for label in kept if not any(label is other for other in joined)))


def _by_index(name: str, function: Callable[[Label, dict[str, Any], torch.Size], Any]) -> None:
    """Registers an operator that moves whole slices: the same is done to every label."""

    def moved(tracer: Tracer, call: Call) -> None:
        source = call.given["self"]
        layout = tracer.layout(source)
        results = [function(label, call.given, source.shape) for label in layout]
        if name == "split":  # into equal parts, whatever the size: each loses the same
            for parts in results:
                for part in parts[1:]:
                    if part.shape == parts[0].shape:
                        tracer.channels.couple(parts[0], part)
        for place, out in enumerate(_outputs(call)):
            tracer.set(out, tuple(result if isinstance(result, np.ndarray) else result[place] for result in results))

    rule(name)(moved)


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
_by_index("split_with_sizes", _split)
_by_index("unbind", _unbound)
_by_index("select", _selected)
_by_index("slice", _sliced)
_by_index("expand", _expanded)
_by_index("flip", _flipped)
_by_index("roll", _rolled)
_by_index("repeat", _tiled)


@rule("cat", "stack")
def _concatenated(tracer: Tracer, call: Call) -> None:
    tensors, out = [t for t in call.given["tensors"] if t.dim() or call.name == "aten::stack"], call.out
    dim = call.given["dim"] % out.dim()
    if call.name == "aten::stack":
        layouts = [tuple(np.expand_dims(label, dim) for label in tracer.layout(tensor)) for tensor in tensors]
        sizes = [1] * len(tensors)
    else:
        tensors = [tensor for tensor in tensors if tensor.shape != (0,)]  # old code starts a list with one of these
        layouts, sizes = [tracer.layout(tensor) for tensor in tensors], [tensor.shape[dim] for tensor in tensors]
    pieces = [next((label for label in layout if dim in span(label)), None) for layout in layouts]
    kept = []
    if any(piece is not None for piece in pieces):
        if all(piece is None or span(piece) == {dim} for piece in pieces):
            why = f"{call.name} joins it with what follows no channels, in {tracer.where}"
            ravelled = [
                tracer.channels.constant(size, why) if piece is None else piece.ravel()
                for piece, size in zip(pieces, sizes, strict=True)
            ]
            kept.append(along(np.concatenate(ravelled), dim, out.dim()))
        else:
            tracer.freeze([piece for piece in pieces if piece is not None], f"{call.name} joins channels of two axes")
    across = [[label for label in layout if dim not in span(label)] for layout in layouts]
    for place in sorted({place for labels in across for label in labels for place in span(label)}):
        met = [next((label for label in labels if place in span(label)), None) for labels in across]
        there = [label for label in met if label is not None]
        for other in there[1:]:
            tracer.channels.couple(there[0], other)
        if any(
            label is None and tensor.shape[dim] and tensor.numel() for label, tensor in zip(met, tensors, strict=True)
        ):
            tracer.freeze(there, f"{call.name} joins it with what follows no channels")
        if not any(other is there[0] for other in kept):
            kept.append(there[0])
    tracer.set(out, tuple(kept))


# -- indices, writes, reductions --------------------------------------------------------------------------------------


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
def _indexed(tracer: Tracer, call: Call) -> None:
    own, indices = call.given["self"], call.given["indices"]
    for index in indices:
        if index is not None:
            tracer.freeze(tracer.layout(index), f"{call.name} takes it as an index")
    place, kept = _index_dims(own, indices), []
    for label in tracer.layout(own):
        if place is None or span(label) & set(place[0]):
            tracer.freeze([label], f"{call.name} picks some of its channels")
        else:
            kept.append(_without(label, *place))
    tracer.set(call.out, tuple(kept))


@rule("index_put")
def _index_written(tracer: Tracer, call: Call) -> None:
    own, values, indices = (call.given[name] for name in ("self", "values", "indices"))
    place = _index_dims(own, indices)
    labels, written = tracer.layout(own), tracer.layout(values)
    picked = place is None or any(span(label) & set(place[0]) for label in labels)
    if picked or values.dim() != own.dim() - len(place[0]) + place[1] or place[0][0] != 0:
        tracer.freeze((*labels, *written), f"{call.name} writes to some of its channels")
        return
    taken, result = place
    shape_back = [
        label.reshape((1,) * len(taken) + label.shape[result:])
        for label in written
        if not span(label) & {*range(result)}
    ]
    if not labels and own._is_view():
        tracer.freeze(written, f"{call.name} writes into a part of a tensor")
        return
    if not labels:
        tracer.set(own, tuple(shape_back))
        tracer.set(call.out, tuple(shape_back))
        return
    for label in labels:
        partner = next((other for other in shape_back if span(other) == span(label)), None)
        if partner is None:
            tracer.freeze([label], f"{call.name} writes what follows no channels to it")
        else:
            tracer.channels.couple(label, partner)
    tracer.set(call.out, labels)


@rule("index_select", "gather", "topk", "sort", "argsort", "_softmax", "_log_softmax", "cummax", "masked_select")
@rule("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std", "var_mean", "any", "all")
@rule("linalg_vector_norm", "norm", "logsumexp", "median", "mode", "kthvalue", "nansum", "count_nonzero")
def _along_dims(tracer: Tracer, call: Call) -> None:
    """Channels along the dimensions that it runs over are mixed or picked; the others go on."""
    if "other" in call.given:  # the larger or smaller of two tensors
        _pointwise(tracer, call)
        return
    own = call.given["self"]
    dims = call.given.get("dim")
    taken = set(range(own.dim())) if dims in (None, []) else {d % own.dim() for d in np.atleast_1d(dims)}
    for tensor in call.tensors():
        if tensor is not own:
            tracer.freeze(tracer.layout(tensor), f"{call.name} takes it as an index")
    kept = [label for label in tracer.layout(own) if not span(label) & taken]
    mixed = [label for label in tracer.layout(own) if span(label) & taken]
    tracer.freeze(mixed, f"{call.name} mixes or picks its channels")
    for out in _outputs(call):
        if out.dim() == own.dim():
            tracer.set(out, tuple(kept))
        elif out.dim() == own.dim() - len(taken):
            tracer.set(out, tuple(label.squeeze(tuple(taken)) for label in kept))


# -- products ---------------------------------------------------------------------------------------------------------


def _read(tracer: Tracer, one: Label | None, other: Label | None, operands: Sequence[Tensor], name: str) -> None:
    """The channels that a product sums over: those of an activation are coupled with a weight's."""
    there = [label for label in (one, other) if label is not None]
    if not there:
        return
    if all(tracer.is_activation(operand) for operand in operands):
        tracer.freeze(there, f"{name} multiplies activations with each other over it")
    elif len(there) == 1:
        tracer.freeze(there, f"{name} sums it with what follows no channels")
    else:
        tracer.channels.couple(one.ravel(), other.ravel())
        weight = there[0] if tracer.is_activation(operands[1]) else there[1]
        tracer.channels.play(weight, "in")


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear")
def _product(tracer: Tracer, call: Call) -> None:
    given, out = call.given, call.out
    names = {"aten::addmm": ("mat1", "mat2"), "aten::baddbmm": ("batch1", "batch2"), "aten::addmv": ("mat", "vec")}
    second = {"aten::mv": "vec", "aten::dot": "tensor", "aten::linear": "weight"}.get(call.name, "mat2")
    first = "input" if call.name == "aten::linear" else "self"
    left, right = (given[name] for name in names.get(call.name, (first, second)))
    across = right.dim() - (1 if right.dim() == 1 or call.name == "aten::linear" else 2)
    summed_left, summed_right = tracer.label(left, -1), tracer.label(right, across)
    wide = [label for label in (summed_left, summed_right) if label is not None and len(span(label)) > 1]
    if wide:
        tracer.freeze(wide, f"{call.name} sums channels of two axes")
    else:
        _read(tracer, summed_left, summed_right, (left, right), call.name)
    kept = []
    for label in tracer.layout(left):
        if label is not summed_left:
            kept.append(label[..., 0] if right.dim() == 1 else label)
    for label in tracer.layout(right):
        if label is summed_right:
            continue
        if call.name == "aten::linear":
            label = along(label.ravel(), out.dim() - 1, out.dim())
        elif right.dim() == 1:
            continue
        partner = next((place for place, other in enumerate(kept) if span(other) & span(label)), None)
        if partner is not None:  # a batch of products, each with a weight of its own
            tracer.channels.couple(kept[partner], label)
            continue
        kept.append(label)
        if not tracer.is_activation(right):
            tracer.channels.play(label, "out")
    if not tracer.is_activation(left):
        for label in tracer.layout(left):
            if label is not summed_left:
                tracer.channels.play(label, "out")
    tracer.set(out, tuple(kept))
    bias = given.get("bias") if call.name == "aten::linear" else given.get("self") if "add" in call.name else None
    if isinstance(bias, Tensor):
        _met(tracer, (out, bias), out, call.name)


@rule("convolution", "_convolution", "conv2d", "conv1d", "conv3d", "torchvision::deform_conv2d")
def _convolution(tracer: Tracer, call: Call) -> None:
    given, out = call.given, call.out
    feature, weight, bias = given["input"], given["weight"], given["bias"]
    groups = given["groups"]
    turned = bool(given.get("transposed"))
    for name in ("offset", "mask"):
        if isinstance(given.get(name), Tensor):
            tracer.freeze(tracer.layout(given[name]), f"{call.name} takes it as positions")
    others = [label for label in tracer.layout(feature) if span(label) != {1}]
    tracer.freeze(others, f"{call.name} slides over it")
    if tracer.is_activation(weight):
        tracer.freeze(tracer.layout(weight), f"{call.name} takes it as a weight")
    channels = next((label.ravel() for label in tracer.layout(feature) if span(label) == {1}), None)
    reads, makes = (tracer.label(weight, dim) for dim in ((0, 1) if turned else (1, 0)))
    if any(label is not None and len(span(label)) > 1 for label in (reads, makes)):
        tracer.freeze(tracer.layout(weight), f"{call.name} has a weight that mixes its axes")
        return
    if groups == 1:
        _read(tracer, None if channels is None else channels, reads, (feature, weight), call.name)
    else:
        makes = _grouped(tracer, channels, reads, makes, groups, turned, out.shape[1], call.name)
    result = None if makes is None else makes.ravel()
    if result is not None:
        tracer.channels.play(result, "out")
        tracer.set(out, (along(result, 1, out.dim()),))
        if isinstance(bias, Tensor) and (offsets := tracer.label(bias, 0)) is not None:
            tracer.channels.couple(result, offsets.ravel())


def _grouped(
    tracer: Tracer,
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
        tracer.freeze([inner], f"{name} keeps the size of its groups")
    outer = reads if turned else makes
    if turned and outputs != groups:  # its outputs have no axis of their own in the weight
        tracer.freeze([label for label in (channels, outer) if label is not None], f"{name} is grouped and transposed")
        return None
    if outer is None:
        return None
    per_group = outer.ravel().reshape(groups, -1)  # [groups, channels made by each]
    tracer.channels.couple(per_group[:, :1], per_group)
    if channels is None:
        tracer.freeze([outer], f"{name} reads what follows no channels")
    else:
        tracer.channels.couple(per_group[:, :1], channels.reshape(groups, -1))
    return outer


# -- normalisation, pooling, regions ----------------------------------------------------------------------------------


def _with_parameters(tracer: Tracer, call: Call, channels: np.ndarray | None) -> None:
    """Couples a feature's channels with the parameters and statistics of a normalisation, ``[C]`` each."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = call.given.get(name)
        if isinstance(tensor, Tensor) and (label := tracer.label(tensor, -1)) is not None:
            if channels is None:
                tracer.freeze([label], f"{call.name} scales what follows no channels")
            elif label.size == channels.size:
                tracer.channels.couple(channels, label.ravel())
            else:
                tracer.freeze([label, channels], f"{call.name} scales groups of channels")


@rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "_batch_norm_impl_index")
@rule(
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def _batch_norm(tracer: Tracer, call: Call) -> None:
    feature = call.given["input"]
    label = tracer.label(feature, 1) if feature.dim() > 1 else None
    _with_parameters(tracer, call, None if label is None else label.ravel())
    tracer.set(_outputs(call)[0], tracer.layout(feature))


@rule("native_group_norm")
def _group_norm(tracer: Tracer, call: Call) -> None:
    feature, groups = call.given["input"], call.given["group"]
    label = tracer.label(feature, 1)
    channels = None if label is None else label.ravel()
    _with_parameters(tracer, call, channels)
    if channels is not None:  # whole groups go or stay
        per_group = channels.reshape(groups, -1)
        tracer.channels.couple(per_group[:, :1], per_group)
        if groups == 1:
            tracer.freeze([channels], f"{call.name} takes its statistics over all channels")
    tracer.set(_outputs(call)[0], tracer.layout(feature))


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(tracer: Tracer, call: Call) -> None:
    feature, count = call.given["input"], len(call.given["normalized_shape"])
    normed = {*range(feature.dim() - count, feature.dim())}
    mixed = [label for label in tracer.layout(feature) if span(label) & normed]
    tracer.freeze(mixed, f"{call.name} takes its statistics over all channels")
    if count == 1:
        _with_parameters(tracer, call, mixed[0].ravel() if mixed else None)
    tracer.set(_outputs(call)[0], tracer.layout(feature))


@rule("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d")
@rule("adaptive_max_pool2d", "mkldnn_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
@rule("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d")
@rule("reflection_pad2d", "replication_pad2d", "im2col_indices", "torchvision::roi_pool")
def _spatial(tracer: Tracer, call: Call) -> None:
    """Works inside every channel map ``[N, C, H, W]``."""
    feature = next(call.tensors())
    kept = [label for label in tracer.layout(feature) if not span(label) & {feature.dim() - 2, feature.dim() - 1}]
    for label in tracer.layout(feature):
        if not any(label is other for other in kept):
            tracer.freeze([label], f"{call.name} slides over it")
    for out in _outputs(call):
        if out.dim() == feature.dim():
            tracer.set(out, tuple(kept))


@rule("constant_pad_nd")
def _padded_by_constants(tracer: Tracer, call: Call) -> None:
    feature, pad = call.given["self"], call.given["pad"]
    padded = {feature.dim() - 1 - k // 2 for k, count in enumerate(pad) if count}
    touched = [label for label in tracer.layout(feature) if span(label) & padded]
    tracer.freeze(touched, f"{call.name} adds channels that follow no others")
    tracer.set(call.out, tuple(label for label in tracer.layout(feature) if not span(label) & padded))


@rule("torchvision::roi_align")
def _regions(tracer: Tracer, call: Call) -> None:
    feature, rois = call.given["input"], call.given["rois"]
    tracer.freeze(tracer.layout(rois), f"{call.name} takes it as regions")
    label = tracer.label(feature, 1)
    tracer.set(call.out, () if label is None else (along(label.ravel(), 1, 4),))


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
@rule(
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math"
)
def _attention(tracer: Tracer, call: Call) -> None:
    """``[N, heads, L, E]``: heads stand side by side, the inside of a head is summed over."""
    query, key, value = (call.given[name] for name in ("query", "key", "value"))
    heads = [label for tensor in (query, key, value) if (label := tracer.label(tensor, 1)) is not None]
    inside = [label for tensor in (query, key) for label in tracer.layout(tensor) if 3 in span(label)]
    tracer.freeze(inside, f"{call.name} multiplies activations with each other over it")
    for other in heads[1:]:
        if span(other) == span(heads[0]) == {1}:
            tracer.channels.couple(heads[0], other)
    if heads and (len(heads) < 3 or any(span(label) != {1} for label in heads)):
        tracer.freeze(heads, f"{call.name} splits it into heads")
    tracer.set(_outputs(call)[0], tracer.layout(value))
