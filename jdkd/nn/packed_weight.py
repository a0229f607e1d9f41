"""The weight of an elastic layer: the shared one, or its active part from the packing of a whole model.

A layer takes a packed part only where the part still holds: for the same record, parameter, dtype and mode of autograd
as it was packed for. Everywhere else it takes its slice, which is always right. What this cannot tell is a write into
the parameter; :mod:`jdkd.experimental.packing` says where that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic, Record, part_of
from jdkd.ops.active_channels import Channels
from jdkd.ops.elastic_kernels import dtype_of
from jdkd.ops.pack import GRAD_MODES, Part, packed_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightPacking:
    """How the weights of layers are packed; whose layers they are, :mod:`jdkd.experimental.packing` says.

    Args:
        dtype: of packed weights; None: that in which a forward computes.
        grad_mode: one of :data:`GRAD_MODES`.
        where: the function that errors name.

    Raises:
        InputError: on another mode or dtype.
    """

    def __init__(self, dtype: torch.dtype | None, grad_mode: str, where: str):
        if grad_mode not in GRAD_MODES:
            raise InputError(f"{where}: grad_mode={grad_mode!r} is none of {', '.join(GRAD_MODES)}")
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"{where}: dtype={dtype!r} is not packed; choose float32, bfloat16 or float16, or None")
        self.dtype, self.grad_mode = dtype, grad_mode


class Packed(NamedTuple):
    """The packed part of a layer's weight, and what it depends on apart from the numbers in the weight."""

    part: Tensor | None  # [Cout, Cin / groups, kh, kw] or [Cout, Cin]; None: no copy is needed
    record: Record
    weight: Tensor | None
    dtype: torch.dtype | None  # computed in; None: this weight is never packed
    capturing: bool  # into a CUDA graph, whose replays are to pack again
    packing: WeightPacking

    def fits(self, layer: ElasticWeight) -> bool:
        """Whether it may stand for the active weight of a layer now."""
        weight = self.weight
        if layer._record is not self.record or layer._parameters.get("weight") is not weight:
            return False
        if self.dtype is None:
            return True
        if self.dtype is not _computed_in(weight, self.packing) or self.capturing is not _is_captured(weight):
            return False
        if self.part is None or not torch.is_grad_enabled():
            return True
        return self.part.requires_grad is weight.requires_grad and not self.part.is_inference()


class ElasticWeight(Elastic):
    """An elastic layer with a shared weight, which can be packed together with those of other layers."""

    _packing: WeightPacking | None = None  # who packs this layer
    _packed: Packed | None = None

    @property
    def active_in_channels(self) -> int:
        return self._record.active.inputs.count

    @property
    def active_out_channels(self) -> int:
        return self._record.active.outputs.count

    def _weight_part(self) -> Part | None:
        """The active part of the weight; None if what a forward uses is no part of it."""
        raise NotImplementedError

    def _packed_weight(self) -> Tensor | None:
        """The packed active weight; None where the layer is to take its slice.

        What :func:`jdkd.experimental.pack_forwards` packed is dropped at the end of a forward, and a checkpointed part
        is recomputed later. The recomputation packs this one weight again, so that it saves the same tensors as the
        forward did and the gradient takes the same way.
        """
        if torch.compiler.is_compiling():
            return None
        if (packed := self._packed) is not None:
            return packed.part if packed.fits(self) else None
        if self._packing is None or torch._C._current_graph_task_id() == -1:
            return None
        pack_together({"": self}, self._packing)
        packed, self._packed = self._packed, None
        return None if packed is None else packed.part

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles, which nobody packs
        return {name: value for name, value in super().__getstate__().items() if name not in ("_packing", "_packed")}


def pack_together(layers: Mapping[str, ElasticWeight], packing: WeightPacking) -> None:
    """Packs the active weights of layers, in one launch for each device and dtype.

    Args:
        layers: by their paths.
        packing: how, and the owner of the packed parts.

    Raises:
        InputError: if gradients are to be added in place to a weight that keeps none; nothing has changed then.
    """
    if torch._C._are_functorch_transforms_active():
        return
    found: dict[str, Packed] = {}
    launches: dict[tuple, list[tuple[str, Packed, Part]]] = {}
    for path, layer in layers.items():
        packed, part = _unpacked(layer, packing), layer._weight_part()
        if part is None or not _needs_copy(packed, part):
            found[path] = packed
            continue
        weight = packed.weight
        if packing.grad_mode == "main_grad" and weight.requires_grad and not weight.is_leaf:
            raise InputError(f"{path}.weight is no leaf and keeps no gradient; use grad_mode='autograd'")
        launches.setdefault((weight.device, weight.dtype, packed.dtype), []).append((path, packed, part))
    for (_, _, dtype), entries in launches.items():
        weights = [packed.weight for _, packed, _ in entries]
        views = packed_weights(weights, [part for *_, part in entries], dtype, packing.grad_mode)
        for (path, packed, _), view in zip(entries, views, strict=True):
            found[path] = Packed(view if packed.weight.requires_grad else view.detach(), *packed[1:])
    for path, packed in found.items():
        vars(layers[path])["_packed"] = packed  # nn.Module's own way takes a microsecond for each


def _unpacked(layer: ElasticWeight, packing: WeightPacking) -> Packed:
    weight = layer._parameters.get("weight")
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in DTYPES and weight.device.type != "meta"
    if not plain:
        return Packed(None, layer._record, weight, None, False, packing)
    return Packed(None, layer._record, weight, _computed_in(weight, packing), _is_captured(weight), packing)


def _computed_in(weight: Tensor, packing: WeightPacking) -> torch.dtype:
    return dtype_of(weight) if packing.dtype is None else packing.dtype


def _is_captured(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _needs_copy(packed: Packed, part: Part) -> bool:
    weight, dtype = packed.weight, packed.dtype
    if dtype is None:
        return False
    into_main = packed.packing.grad_mode == "main_grad" and getattr(weight, "main_grad", None) is not None
    if dtype is not weight.dtype or into_main or part.kernel is not None:
        return True
    for channels, maximum in zip((part.rows, part.columns), weight.shape, strict=False):
        if channels is not None and (channels.index is not None or channels.count != maximum):
            return True
    is_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return not (is_last or weight.is_contiguous())


def packed_bias(bias: Tensor | None, outputs: Channels, dtype: torch.dtype) -> Tensor | None:
    """The active part of a bias, ``[Cout]``, in the dtype of packed weights."""
    return None if bias is None else part_of(bias, outputs).to(dtype)
