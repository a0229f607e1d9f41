"""The weight of an elastic layer: the shared one, or its active part from the packing of a whole model.

A layer takes a packed part only where the part still holds: for the same record, parameter, dtype and mode of autograd
as it was packed for. Everywhere else it takes its slice, which is always right. What this cannot tell is a write into
the parameter; :mod:`jdkd.nn.packing` says where that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic, Record, part_of
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, packed_weights

if TYPE_CHECKING:
    from jdkd.nn.packing import Packing

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Basis(NamedTuple):
    """What the packed part of a layer depends on, apart from the numbers in the weight."""

    record: Record
    weight: Tensor | None
    dtype: torch.dtype | None  # to compute in; None: this weight is not packed
    capturing: bool  # into a CUDA graph, whose replays are to pack again

    def same(self, other: Basis) -> bool:
        return self.record is other.record and self.weight is other.weight and self[2:] == other[2:]


class Packed(NamedTuple):
    """The packed part of a layer's weight."""

    part: Tensor | None  # [Cout, Cin / groups, kh, kw] or [Cout, Cin]; None: the shared weight needs no copy
    basis: Basis
    packing: Packing

    def fits(self, layer: ElasticWeight) -> bool:
        """Whether it may stand for the active weight of a layer now."""
        basis, part = self.basis, self.part
        if not basis.same(layer._basis(self.packing)):
            return False
        if part is None or not torch.is_grad_enabled():
            return True
        return part.requires_grad == basis.weight.requires_grad and not part.is_inference()


class ElasticWeight(Elastic):
    """An elastic layer with a shared weight, which can be packed together with those of other layers."""

    _packing: Packing | None = None  # who packs this layer
    _packed: Packed | None = None

    def _weight_part(self) -> Part | None:
        """The active part of the weight; None if what a forward uses is no part of it."""
        raise NotImplementedError

    def _packed_weight(self) -> Tensor | None:
        """The packed active weight; None where the layer is to take its slice.

        A recomputation finds nothing packed if the forward of the model did its packing and is over. It packs this one
        weight then, so that it saves the tensors that the forward saved, and its gradient goes the same way.
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

    def _basis(self, packing: Packing) -> Basis:
        weight = self._parameters.get("weight")
        plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in DTYPES
        if not plain or weight.device.type == "meta":
            return Basis(self._record, weight, None, False)
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        return Basis(self._record, weight, packing.dtype or _computed_in(weight), capturing)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles, which nobody packs
        return {name: value for name, value in vars(self).items() if name not in ("_packing", "_packed")}


def pack_together(layers: Mapping[str, ElasticWeight], packing: Packing) -> None:
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
    launches: dict[tuple, list[tuple[str, Basis, Part]]] = {}
    for path, layer in layers.items():
        basis, part = layer._basis(packing), layer._weight_part()
        if part is None or not _needs_copy(basis, part, packing.grad_mode):
            found[path] = Packed(None, basis, packing)
            continue
        weight = basis.weight
        if packing.grad_mode == "main_grad" and weight.requires_grad and not weight.is_leaf:
            raise InputError(f"{path}.weight is no leaf and keeps no gradient; use grad_mode='autograd'")
        launches.setdefault((weight.device, weight.dtype, basis.dtype), []).append((path, basis, part))
    for (_, _, dtype), entries in launches.items():
        weights = [basis.weight for _, basis, _ in entries]
        views = packed_weights(weights, [part for *_, part in entries], dtype, packing.grad_mode)
        for (path, basis, _), view in zip(entries, views, strict=True):
            found[path] = Packed(view if basis.weight.requires_grad else view.detach(), basis, packing)
    for path, packed in found.items():
        vars(layers[path])["_packed"] = packed  # nn.Module's own way takes a microsecond for each


def packed_bias(bias: Tensor | None, outputs: Channels, dtype: torch.dtype) -> Tensor | None:
    """The active part of a bias, ``[Cout]``, in the dtype of packed weights."""
    return None if bias is None else part_of(bias, outputs).to(dtype)


def _computed_in(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _needs_copy(basis: Basis, part: Part, grad_mode: str) -> bool:
    weight = basis.weight
    if basis.dtype is None:
        return False
    if basis.dtype != weight.dtype or (grad_mode == "main_grad" and getattr(weight, "main_grad", None) is not None):
        return True
    for channels, maximum in zip((part.rows, part.columns), weight.shape, strict=False):
        if channels is not None and (channels.index is not None or channels.count != maximum):
            return True
    is_dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    return part.kernel is not None or not is_dense
