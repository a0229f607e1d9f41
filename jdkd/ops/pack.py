"""Packing the active weights of a subnet: all of them in one launch, and their gradients back in another.

The shared weights stay what they are, usually float32; a subnet's convolutions get views of one flat buffer, dense,
channels-last, in the dtype they compute in. :func:`pack` and :func:`unpack_add_` are the plain functions,
:func:`packed_weights` is the one with gradients. The formulas are in :mod:`jdkd.reference.pack`, the tables that the
kernels read in :mod:`jdkd.ops.pack_table`.

Addresses are read at every call, so an optimiser, ``.data =``, an average written in place or
``load_state_dict(assign=True)`` are seen by the next pack. Nothing is cached by the value of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.ops.active_channels import Channels, on_device
from jdkd.ops.pack_memory import empty, zeros
from jdkd.ops.pack_table import PackTable, aligned, dense_strides, dense_views, packed_numel, packed_views, table_of
from jdkd.reference import pack as reference

_OP = "pack"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
for _name in ("cuda", "triton", "cpu"):
    _backend.register(_OP, _name, dtypes=_DTYPES)
_backend.register(_OP, "reference")

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


def _check_alike(tensors: Sequence[Tensor], what: str) -> None:
    first = tensors[0]
    for place, tensor in enumerate(tensors):
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise InputError(
                f"{what} {place} is {tensor.dtype} on {tensor.device} and {what} 0 {first.dtype} on {first.device}; "
                "make a call for each dtype and device"
            )


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
    with torch.no_grad():
        buffer = torch.ops.jdkd.pack(list(weights), *flat, dtype)
    packed, offset = [], 0
    for places in _groups(weights, grad_mode):
        own = flat.kept(places)
        packed += _PackedWeights.apply(buffer, offset, grad_mode, *own, *[weights[i] for i in places])
        offset += packed_numel(own.sizes, dtype.itemsize)
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


def _as_packed(gradients: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Packed gradients in the memory order of packed weights, checked."""
    _check_alike(gradients, "packed gradient")
    if gradients[0].device != device:
        raise InputError(
            f"the packed gradients are on {gradients[0].device} but what they are added to on {device}; move them there"
        )
    dense = []
    for i, gradient in enumerate(gradients):
        expected = tuple(sizes[4 * i : 4 * i + 4])[: gradient.dim()]
        if gradient.dim() not in (1, 2, 4) or gradient.shape != expected:
            raise InputError(f"packed gradient {i} has shape {tuple(gradient.shape)} but its part is {expected}")
        layout = torch.channels_last if gradient.dim() == 4 else torch.contiguous_format
        dense.append(gradient.contiguous(memory_format=layout))
    return dense


# ---- operators ----


def _pack(
    weights: list[Tensor], rows: list[Tensor | None], columns: list[Tensor | None], sizes: list[int], dtype: torch.dtype
) -> Tensor:
    _check_alike(weights, "weight")
    backend = _selected(weights[0], dtype)
    table = table_of(weights, [weight.stride() for weight in weights], rows, columns, sizes, dtype)
    buffer = empty(table.numel, dtype, weights[0].device)
    if backend == "reference":
        packed = reference.pack(weights, *_plain(rows, columns, sizes, buffer.device), dtype)
        for view, part in zip(packed_views(buffer, weights, sizes), packed, strict=True):
            view.copy_(part)
    else:
        _launch("pack", backend, table, weights, buffer)
    return buffer


def _unpack(
    packed: list[Tensor],
    like: list[Tensor],
    rows: list[Tensor | None],
    columns: list[Tensor | None],
    sizes: list[int],
) -> Tensor:
    _check_alike(like, "weight")
    packed = _as_packed(packed, sizes, like[0].device)
    backend = _selected(like[0], packed[0].dtype)
    table = table_of(like, [dense_strides(weight) for weight in like], rows, columns, sizes, packed[0].dtype)
    buffer = zeros(table.dense_numel, like[0])
    if backend == "reference":
        views = dense_views(buffer, like)
        reference.unpack_add_(views, *_plain(rows, columns, sizes, buffer.device), packed)
    else:
        _launch("unpack", backend, table, packed, buffer)
    return buffer


def _unpack_add_(
    gradients: list[Tensor],
    rows: list[Tensor | None],
    columns: list[Tensor | None],
    sizes: list[int],
    packed: list[Tensor],
) -> None:
    _check_alike(gradients, "gradient")
    packed = _as_packed(packed, sizes, gradients[0].device)
    if len({gradient.data_ptr() for gradient in gradients}) < len(gradients):
        raise InputError("a gradient is given twice; add its parts in calls of their own")
    backend = _selected(gradients[0], packed[0].dtype)
    strides = [gradient.stride() for gradient in gradients]
    table = table_of(gradients, strides, rows, columns, sizes, packed[0].dtype)
    if backend == "reference":
        reference.unpack_add_(gradients, *_plain(rows, columns, sizes, gradients[0].device), packed)
        return
    _launch("unpack_add_", backend, table, gradients, packed)
    torch.autograd.graph.increment_version(gradients)


def _selected(shared: Tensor, dtype: torch.dtype) -> str:
    backend = _backend.select(_OP, shared)
    if backend != "reference" and dtype not in _DTYPES:
        raise InputError(f"dtype={dtype} is not packed from {shared.dtype}; choose float32, bfloat16 or float16")
    return backend


def _plain(
    rows: list[Tensor | None], columns: list[Tensor | None], sizes: list[int], device: torch.device
) -> tuple[list[int | Tensor], list[int | Tensor], list[tuple[int, int]]]:
    """The arguments of the reference."""
    lists = [[on_device(index, device) for index in side] for side in (rows, columns)]
    active = [
        [count if index is None else index for index, count in zip(side, sizes[first::4], strict=True)]
        for first, side in enumerate(lists)
    ]
    return *active, list(zip(sizes[2::4], sizes[3::4], strict=True))


def _launch(op: str, backend: str, table: PackTable, tensors: list[Tensor], other: Tensor | list[Tensor]) -> None:
    """A launch of a compiled kernel over all parts of a table; ``other`` is the flat buffer, or what is added."""
    if backend == "triton":
        from jdkd.kernels import pack as kernels

        one, singles = (other, tensors) if isinstance(other, Tensor) else (other[0], [*tensors, *other])
        addresses = tuple([tensor.data_ptr() for tensor in singles])
        is_aligned = all(address % 16 == 0 for address in addresses)
        shared, packed = (one, tensors[0]) if op == "unpack" else (tensors[0], one)
        kernels.launch(op, table.addresses(addresses), shared, packed, *table.tensors(), is_aligned)
    else:
        given = table.tensors() if backend == "cuda" else (table.parts, None, table.index)
        getattr(torch.ops.jdkd_C, op)(tensors, *given, other)


def _pack_fake(
    weights: list[Tensor], rows: list[Tensor | None], columns: list[Tensor | None], sizes: list[int], dtype: torch.dtype
) -> Tensor:
    numels = [r * c * h * w for r, c, h, w in zip(*(sizes[i::4] for i in range(4)), strict=True)]
    return weights[0].new_empty(sum(aligned(numel, dtype.itemsize) for numel in numels), dtype=dtype)


def _unpack_fake(
    packed: list[Tensor],
    like: list[Tensor],
    rows: list[Tensor | None],
    columns: list[Tensor | None],
    sizes: list[int],
) -> Tensor:
    return like[0].new_empty(sum(aligned(weight.numel(), weight.element_size()) for weight in like))


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_PARTS = "Tensor?[] rows, Tensor?[] columns, SymInt[] sizes"
_library.define(f"pack(Tensor[] weights, {_PARTS}, ScalarType dtype) -> Tensor", tags=_TAGS)
_library.define(f"unpack(Tensor[] packed, Tensor[] like, {_PARTS}) -> Tensor", tags=_TAGS)
_library.define(f"unpack_add_(Tensor(a!)[] gradients, {_PARTS}, Tensor[] packed) -> ()", tags=_TAGS)
for _name, _body, _fake in (
    ("pack", _pack, _pack_fake),
    ("unpack", _unpack, _unpack_fake),
    ("unpack_add_", _unpack_add_, lambda *_: None),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"jdkd::{_name}", _fake, lib=_library)
