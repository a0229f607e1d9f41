"""Packing the active weights of a subnet: all of them in one launch, and their gradients back in another.

The shared weights stay what they are, usually float32; a subnet's convolutions get views of one flat buffer, dense,
channels-last, in the dtype they compute in. :func:`pack` and :func:`unpack_add_` are the plain functions,
:func:`packed_weights` is the one with gradients. The formulas are in :mod:`jdkd.reference.pack`, the tables that the
kernels read in :mod:`jdkd.ops.pack_table`, the operators in :mod:`jdkd.ops.pack_operators`.

Addresses are read at every call, so an optimiser, ``.data =``, an average written in place or
``load_state_dict(assign=True)`` are seen by the next pack. Nothing is cached by the value of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jdkd.errors import InputError
from jdkd.ops import pack_operators  # noqa: F401  torch.ops.jdkd.pack, unpack and unpack_add_
from jdkd.ops.active_channels import Channels, active_part
from jdkd.ops.layout import in_layout
from jdkd.ops.pack_table import dense_views, packed_numel, packed_views
from jdkd.ops.transforms import is_looked_into

GRAD_MODES = ("autograd", "main_grad")
GROUP_BYTES = 8 << 20  # of dense gradients that a CPU makes together


class Part(NamedTuple):
    """The active part of a shared weight ``[Cout_max, Cin_max / groups, kh, kw]``, ``[Cout_max, Cin_max]`` or
    ``[C_max]``.

    Args:
        rows: active channels of dimension 0.
        columns: active channels of dimension 1; None: all of them, as in a grouped convolution.
        kernel: ``(kh', kw')``, the centre crop, in taps; None: the whole kernel.
    """

    rows: Channels
    columns: Channels | None = None
    kernel: tuple[int, int] | None = None


class _Flat(NamedTuple):
    """Parts as the operators take them."""

    rows: list[Tensor | None]  # [count] int64 each; None: leading rows
    columns: list[Tensor | None]
    sizes: list[int]  # rows, columns, kh', kw' of each

    def kept(self, places: Sequence[int]) -> _Flat:
        sizes = [size for i in places for size in self.sizes[4 * i : 4 * i + 4]]
        return _Flat([self.rows[i] for i in places], [self.columns[i] for i in places], sizes)


def _flattened(weights: Sequence[Tensor], parts: Sequence[Part], what: str) -> _Flat:
    if len(weights) != len(parts) or not weights:
        raise InputError(f"{len(weights)} {what} were given for {len(parts)} parts; give one each, at least one")
    sizes: list[int] = []
    for weight, part in zip(weights, parts, strict=True):
        shape = weight.shape
        columns = part.columns.count if part.columns is not None else shape[1] if len(shape) > 1 else 1
        sizes += (part.rows.count, columns, *(part.kernel or (shape[2:] if len(shape) == 4 else (1, 1))))
    return _Flat([p.rows.index for p in parts], [p.columns.index if p.columns else None for p in parts], sizes)


def pack(weights: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    """Copies the active parts of all weights into one buffer, in one launch and without a gradient.

    There is no device synchronisation. The first call of a subnet uploads its table; later ones can be captured in a
    CUDA graph, which keeps the table until the process ends.

    Args:
        weights: shared weights of one dtype, on one device, any strides.
        parts: what is active of each. Listed channels keep the order given.
        dtype: of the copies, rounded once to nearest: float32, bfloat16 or float16 (float64 of float64).

    Returns:
        Views of one buffer, each at a multiple of 128 bytes: ``[Cout, Cin / groups, kh', kw']`` in channels-last
        memory, ``[Cout, Cin]`` or ``[C]``.

    Raises:
        InputError: if a part does not fit its weight, the weights are of several dtypes or devices, or the first call
            of a subnet is to be captured.
    """
    flat = _flattened(weights, parts, "weights")
    with torch.no_grad():
        if is_looked_into():
            return _plainly(weights, parts, dtype)
        buffer = torch.ops.jdkd.pack(list(weights), *flat, dtype)
        return packed_views(buffer, weights, flat.sizes)


def unpack_add_(gradients: Sequence[Tensor], parts: Sequence[Part], packed_gradients: Sequence[Tensor]) -> None:
    """Adds the gradients of packed weights to those of the shared weights in place, in one launch.

    Whatever is not active stays as it is, bit for bit. Sums are formed in float32 and rounded once.

    Args:
        gradients: shaped as the shared weights, of one dtype, distinct and without overlap.
        parts: what is active of each.
        packed_gradients: shaped as :func:`pack` returns them, of one dtype, on the device of the gradients; copied
            first unless they lie in memory as packed weights do.

    Raises:
        InputError: as :func:`pack`; if a packed gradient does not fit or is on another device; or if a gradient is
            given twice.
    """
    flat = _flattened(gradients, parts, "gradients")
    if len(packed_gradients) != len(parts):
        raise InputError(f"{len(packed_gradients)} packed gradients were given for {len(parts)} parts; give one each")
    with torch.no_grad():
        torch.ops.jdkd.unpack_add_(list(gradients), *flat, list(packed_gradients))


def packed_weights(
    weights: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype, grad_mode: str = "autograd"
) -> list[Tensor]:
    """:func:`pack` with gradients.

    Args:
        weights: shared weights, as for :func:`pack`.
        parts: what is active of each.
        dtype: of the copies.
        grad_mode: ``"autograd"`` gives every weight a dense gradient, zero where inactive: views of one buffer, on
            a CPU of one for a few neighbours, which lives as long as any of them. ``"main_grad"`` adds to
            ``weight.main_grad``, or else ``weight.grad``, in place, and creates it if missing. It writes only what is
            active, and nothing that ``autograd.grad`` or ``backward(inputs=)`` leave alone; hooks on the weights see
            None, and of ``main_grad`` ``DistributedDataParallel`` knows nothing.

    Returns:
        As :func:`pack`.

    Raises:
        InputError: as :func:`pack`; on another mode; or if ``"main_grad"`` meets a weight that is no leaf.
    """
    if grad_mode not in GRAD_MODES:
        raise InputError(f"grad_mode={grad_mode!r} is none of {', '.join(GRAD_MODES)}")
    if grad_mode == "main_grad":
        for place, weight in enumerate(weights):
            if weight.requires_grad and not weight.is_leaf:
                raise InputError(f"weight {place} is no leaf and keeps no gradient; use grad_mode='autograd'")
    flat = _flattened(weights, parts, "weights")
    if is_looked_into():
        if grad_mode == "main_grad":
            raise InputError(
                "grad_mode='main_grad' adds to weight.grad itself, which torch.export and torch.func do not allow; use "
                "'autograd'"
            )
        return _plainly(weights, parts, dtype)
    with torch.no_grad():
        buffer = torch.ops.jdkd.pack(list(weights), *flat, dtype)
    packed, offset = [], 0
    for places in _groups(weights, grad_mode):
        own = flat.kept(places)
        packed += _PackedWeights.apply(buffer, offset, grad_mode, *own, *[weights[i] for i in places])
        offset += packed_numel(own.sizes, dtype.itemsize)
    return packed


def _plainly(weights: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    """The packed weights one by one, in plain torch and with its gradients, for what looks into the call."""
    packed = []
    for weight, (rows, columns, kernel) in zip(weights, parts, strict=True):
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        packed.append(in_layout(active_part(weight, rows, columns, kernel).to(dtype), layout))
    return packed


def _groups(weights: Sequence[Tensor], grad_mode: str) -> list[Sequence[int]]:
    """Neighbours whose gradients are made together: all of them on a GPU; on a CPU what a cache holds until it is
    added to the weights' own."""
    if weights[0].device.type != "cpu" or grad_mode == "main_grad" or not torch.is_grad_enabled():
        return [range(len(weights))]
    first, size, groups = 0, 0, []
    for place, weight in enumerate(weights):
        more = weight.numel() * weight.element_size()
        if size + more > GROUP_BYTES and place > first:
            groups.append(range(first, place))
            first, size = place, 0
        size += more
    return [*groups, range(first, len(weights))]


class _PackedWeights(torch.autograd.Function):
    """The autograd rule of a group: linear, so all that is kept is where the weights lie."""

    @staticmethod
    def forward(
        ctx: Any,
        buffer: Tensor,  # [all packed weights], written
        offset: int,  # of the group's first one
        grad_mode: str,
        rows: list[Tensor | None],
        columns: list[Tensor | None],
        sizes: list[int],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.flat, ctx.grad_mode, ctx.weights = _Flat(rows, columns, sizes), grad_mode, weights
        ctx.set_materialize_grads(False)
        return tuple(packed_views(buffer, weights, sizes, offset))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *packed: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[6:]
        places = [i for i, gradient in enumerate(packed) if gradient is not None and needed[i]]
        found: list[Tensor | None] = [None] * len(packed)
        if places and ctx.grad_mode == "main_grad":
            leaves = [leaf for leaf, _ in ctx.next_functions[1:]]  # the first one is the buffer's
            _accumulate(ctx.weights, ctx.flat, packed, [i for i in places if _is_reached(leaves[i])])
        elif places:
            like = [ctx.weights[i] for i in places]
            flat = ctx.flat.kept(places)
            buffer = torch.ops.jdkd.unpack([packed[i] for i in places], like, *flat)
            for i, gradient in zip(places, dense_views(buffer, like), strict=True):
                found[i] = gradient
        return (*(None,) * 6, *found)


def _accumulate(weights: Sequence[Tensor], flat: _Flat, packed: Sequence[Tensor | None], places: list[int]) -> None:
    """Adds to the weights' own gradients, a launch for each dtype and device of these; a weight that was packed twice
    takes a launch for each."""
    while places:
        first = {id(weights[i]): i for i in reversed(places)}
        own = [i for i in places if first[id(weights[i])] == i]
        launches: dict[tuple, list[tuple[int, Tensor]]] = {}
        for i in own:
            gradient = _own_gradient(weights[i])
            launches.setdefault((gradient.dtype, gradient.device), []).append((i, gradient))
        for entries in launches.values():
            alike, gradients = zip(*entries, strict=True)
            torch.ops.jdkd.unpack_add_(list(gradients), *flat.kept(alike), [packed[i] for i in alike])
        places = [i for i in places if i not in own]


def _is_reached(leaf: Any) -> bool:
    """Whether this backward pass is to add to a leaf, unlike ``autograd.grad`` and ``backward(inputs=[others])``."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError as error:
        if "autograd.grad" not in str(error):
            raise
        return False  # it asks for the leaf itself


def _own_gradient(weight: Tensor) -> Tensor:
    name = "grad" if getattr(weight, "main_grad", None) is None else "main_grad"
    if (gradient := getattr(weight, name)) is None:
        gradient = weight.grad = torch.zeros_like(weight)
    if gradient.shape != weight.shape or torch._debug_has_internal_overlap(gradient) == 1:
        raise InputError(
            f"{name} of a weight {tuple(weight.shape)} has shape {tuple(gradient.shape)} and strides "
            f"{gradient.stride()}; give one of the weight's shape, in memory of its own for every element"
        )
    return gradient
