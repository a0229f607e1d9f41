"""The operators ``jdkd::pack``, ``jdkd::unpack`` and ``jdkd::unpack_add_``, and their backends; no autograd.

:mod:`jdkd.ops.pack` has the functions. ``rows`` and ``columns`` hold a list of active channels, int64, for each weight,
or None for leading ones; ``sizes`` holds rows, columns, kh' and kw' of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.ops import pack_check
from jdkd.ops.active_channels import on_device
from jdkd.ops.host_memory import empty, zeros
from jdkd.ops.pack_table import PackTable, aligned, dense_strides, dense_views, packed_views, table_of
from jdkd.reference import pack as reference

_OP = "pack"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_alike(tensors: Sequence[Tensor], what: str) -> None:
    first = tensors[0]
    for place, tensor in enumerate(tensors):
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise InputError(
                f"{what} {place} is {tensor.dtype} on {tensor.device} and {what} 0 {first.dtype} on {first.device}; "
                "make a call for each dtype and device"
            )


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


def _pack(
    weights: list[Tensor], rows: list[Tensor | None], columns: list[Tensor | None], sizes: list[int], dtype: torch.dtype
) -> Tensor:
    _check_alike(weights, "weight")
    return _pack_on(_selected("pack", weights[0], dtype), weights, rows, columns, sizes, dtype)


def _pack_on(
    backend: str, weights: list[Tensor], rows: list[Tensor | None], columns: list[Tensor | None], sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
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
    return _unpack_on(_selected("unpack", like[0], packed[0].dtype), packed, like, rows, columns, sizes)


def _unpack_on(
    backend: str, packed: list[Tensor], like: list[Tensor], rows: list[Tensor | None], columns: list[Tensor | None],
    sizes: list[int],
) -> Tensor:  # fmt: skip
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
    backend = _selected("unpack_add_", gradients[0], packed[0].dtype)
    _unpack_add_on(backend, gradients, rows, columns, sizes, packed)


def _unpack_add_on(
    backend: str, gradients: list[Tensor], rows: list[Tensor | None], columns: list[Tensor | None], sizes: list[int],
    packed: list[Tensor],
) -> None:  # fmt: skip
    strides = [gradient.stride() for gradient in gradients]
    table = table_of(gradients, strides, rows, columns, sizes, packed[0].dtype)
    if backend == "reference":
        reference.unpack_add_(gradients, *_plain(rows, columns, sizes, gradients[0].device), packed)
        return
    _launch("unpack_add_", backend, table, gradients, packed)
    torch.autograd.graph.increment_version(gradients)


_CHECKS = {
    "pack": lambda backend, *where: pack_check.pack(partial(_pack_on, backend), *where),
    "unpack": lambda backend, *where: pack_check.unpack(partial(_unpack_on, backend), *where),
    "unpack_add_": lambda backend, *where: pack_check.unpack_add_(partial(_unpack_add_on, backend), *where),
}
for _name in ("cuda", "triton", "cpu"):
    _backend.register(_OP, _name, dtypes=_DTYPES, checks=_CHECKS)
_backend.register(_OP, "reference")
_backend.tune_by(_OP, lambda first: "")


def _selected(form: str, shared: Tensor, dtype: torch.dtype) -> str:
    backend = _backend.select(_OP, shared, form)
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
