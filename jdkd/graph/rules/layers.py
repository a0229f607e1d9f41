"""Normalisation, pooling, regions of interest, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from jdkd.graph.layout import along, span
from jdkd.graph.rules.registry import outputs, rule

if TYPE_CHECKING:
    from jdkd.graph.marks import Call, Marks


REMEDY = "with fewer the others would change; a batch norm, or a group norm of several groups, would free them"


def _with_parameters(marks: Marks, call: Call, channels: np.ndarray | None) -> None:
    """Couples a feature's channels with the parameters and statistics of a normalisation, ``[C]`` each."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = call.given.get(name)
        if isinstance(tensor, Tensor) and (label := marks.label(tensor, -1)) is not None:
            if channels is None:
                marks.freeze([label], f"{call.name} scales what follows no channels")
            elif label.size == channels.size:
                marks.channels.couple(channels, label.ravel())
            else:
                marks.freeze([label, channels], f"{call.name} scales groups of channels")


@rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "_batch_norm_impl_index")
@rule(
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def _batch_norm(marks: Marks, call: Call) -> None:
    feature = call.given["input"]
    label = marks.label(feature, 1) if feature.dim() > 1 else None
    _with_parameters(marks, call, None if label is None else label.ravel())
    marks.set(outputs(call)[0], marks.layout(feature))


@rule("native_group_norm")
def _group_norm(marks: Marks, call: Call) -> None:
    feature, groups = call.given["input"], call.given["group"]
    label = marks.label(feature, 1)
    channels = None if label is None else label.ravel()
    _with_parameters(marks, call, channels)
    if channels is not None:  # whole groups go or stay
        per_group = channels.reshape(groups, -1)
        marks.channels.couple(per_group[:, :1], per_group)
        if groups == 1:
            marks.freeze([channels], f"{call.name} takes its statistics over all channels", REMEDY)
    marks.set(outputs(call)[0], marks.layout(feature))


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(marks: Marks, call: Call) -> None:
    feature, count = call.given["input"], len(call.given["normalized_shape"])
    normed = {*range(feature.dim() - count, feature.dim())}
    mixed = [label for label in marks.layout(feature) if span(label) & normed]
    marks.freeze(mixed, f"{call.name} takes its statistics over all channels", REMEDY)
    if count == 1:
        _with_parameters(marks, call, mixed[0].ravel() if mixed else None)
    marks.set(outputs(call)[0], marks.layout(feature))


@rule("_weight_norm_interface")
def _weight_norm(marks: Marks, call: Call) -> None:
    """A weight is divided by its norm over all dimensions but one, and multiplied with a gain."""
    weight, gain, kept = call.given["v"], call.given["g"], call.given["dim"]
    label, gains = marks.label(weight, kept), marks.label(gain, kept)
    marks.freeze([other for other in marks.layout(weight) if other is not label], f"{call.name} takes a norm over it")
    if label is not None and gains is not None:
        marks.channels.couple(label, gains, one_weight=True)
    marks.set(outputs(call)[0], marks.layout(weight))


@rule("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d")
@rule("adaptive_max_pool2d", "mkldnn_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
@rule("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d")
@rule("reflection_pad2d", "replication_pad2d")
def spatial(marks: Marks, call: Call) -> None:
    """Works inside every channel map ``[N, C, H, W]``."""
    feature = next(call.tensors())
    kept = [label for label in marks.layout(feature) if not span(label) & {feature.dim() - 2, feature.dim() - 1}]
    for label in marks.layout(feature):
        if not any(label is other for other in kept):
            marks.freeze([label], f"{call.name} slides over it")
    for other in call.tensors():
        if other is not feature:
            marks.freeze(marks.layout(other), f"{call.name} takes it as positions")
    for out in outputs(call):
        if out.dim() == feature.dim():
            marks.set(out, tuple(kept))


@rule("constant_pad_nd")
def _padded_by_constants(marks: Marks, call: Call) -> None:
    feature, pad = call.given["self"], call.given["pad"]
    padded = {feature.dim() - 1 - k // 2 for k, count in enumerate(pad) if count}
    touched = [label for label in marks.layout(feature) if span(label) & padded]
    marks.freeze(touched, f"{call.name} adds channels that follow no others")
    marks.set(call.out, tuple(label for label in marks.layout(feature) if not span(label) & padded))


@rule("torchvision::roi_align", "torchvision::roi_pool")
def _regions(marks: Marks, call: Call) -> None:
    feature, rois = call.given["input"], call.given["rois"]
    marks.freeze(marks.layout(rois), f"{call.name} takes it as regions")
    label = marks.label(feature, 1)
    for out in outputs(call):
        marks.set(out, () if label is None else (along(label.ravel(), 1, 4),))


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
@rule(
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math"
)
def _attention(marks: Marks, call: Call) -> None:
    """``[N, heads, L, E]``: heads stand side by side, the inside of a head is summed over."""
    query, key, value = (call.given[name] for name in ("query", "key", "value"))
    heads = [label for tensor in (query, key, value) if (label := marks.label(tensor, 1)) is not None]
    inside = [label for tensor in (query, key) for label in marks.layout(tensor) if 3 in span(label)]
    marks.freeze(inside, f"{call.name} multiplies activations with each other over it")
    for other in heads[1:]:
        if span(other) == span(heads[0]) == {1}:
            marks.channels.couple(heads[0], other)
    if heads and (len(heads) < 3 or any(span(label) != {1} for label in heads)):
        marks.freeze(heads, f"{call.name} splits it into heads")
    marks.set(outputs(call)[0], marks.layout(value))
