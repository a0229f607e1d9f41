"""Where the active weights of a subnet lie: the tables that the pack kernels read, kept by what they depend on.

A *part* is the active piece of one shared weight. In packed order its dimensions are row, tap row, tap column, column.
Neighbouring dimensions that lie in memory like one are merged, so that a whole 1x1 weight is a single run, and a
depthwise one has its taps for columns. A part is then cut into *pieces* of about :data:`PIECE` elements, the unit of
work of every backend, and gets one of three modes:

* ``COPY``: runs of columns, whole 16-byte vectors on both sides;
* ``TURN``: taps are innermost in the shared weight (a contiguous 3x3), columns in the packed one;
* ``GATHER``: element by element, for whatever else there is.

The layout of a row of the table is ``csrc/ops/pack.h``'s ``Part``.

A CUDA graph reads tables and addresses again whenever it is replayed, and does not tell when it is gone. What it reads
is kept until the process ends: a table once, and for the Triton kernel every set of addresses, 8 bytes each.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdkd.errors import InputError
from jdkd.ops.active_channels import on_device
from jdkd.reference.pack import crop_origin

COPY, GATHER, TURN = range(3)
PIECE = 4096  # elements of a piece, about
TURN_CELLS = 4608  # floats of on-chip memory in which a piece is turned
ALIGNMENT = 128  # bytes, of every part in a flat buffer
MAX_TABLES = 256
MAX_RUN = 2**30  # elements of a merged dimension

Size4 = tuple[int, int, int, int]  # rows, columns, kh', kw' of a part


class _Dim(NamedTuple):
    """A dimension in packed order: its slot ("r", "y", "x" or "c"), size, stride, and where its list begins."""

    slot: str
    size: int
    stride: int
    listed: int = -1


class PackTable:
    """The parts of one subnet in one memory layout, on the host and on the device.

    Args:
        shapes: of the shared weights.
        strides: of the shared weights, in elements.
        rows: the list of active rows of each, None for leading ones.
        columns: likewise.
        sizes: rows, columns, kh', kw' of each part.
        itemsizes: bytes of a shared and of a packed element.
        device: where the weights are.

    Raises:
        InputError: if a part does not fit its weight.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[tuple[int, ...]],
        rows: Sequence[Tensor | None],
        columns: Sequence[Tensor | None],
        sizes: Sequence[Size4],
        itemsizes: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.device = device
        self.held = (*rows, *columns)  # the identity of a list is part of the key
        index, places = _joined_lists(self.held, device)
        self.offsets, self.numel = _offsets([_product(size) for size in sizes], itemsizes[1])
        self.dense_offsets, self.dense_numel = _offsets([_product(shape) for shape in shapes], itemsizes[0])
        fields = []
        for i, (shape, stride, size) in enumerate(zip(shapes, strides, sizes, strict=True)):
            _check_part(i, shape, size)
            for dim, listed in enumerate((rows[i], columns[i])):
                if listed is not None:
                    _check_list(i, ("rows", "columns")[dim], listed, size[dim], shape[dim])
            own = _fields(shape, stride, size, (places[i], places[len(shapes) + i]), itemsizes)
            fields.append((*own, self.offsets[i], self.dense_offsets[i]))
        parts = torch.tensor(fields, dtype=torch.int64, device="cpu")  # [P, 16]
        self.index = index  # [lists together] int64
        self.parts = on_device(parts, device)
        self._pieces = on_device(_pieces(parts), device) if device.type != "cpu" else None
        self.pointers: tuple[Any, Tensor] | None = None  # what a kernel without pointer arguments reads, and its key
        self.replayed: dict[tuple[int, ...], Tensor] = {}  # addresses in pinned memory that graphs copy from
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None  # of the upload
        self.uploaded_event = None if self.stream is None else self.stream.record_event()

    @property
    def pieces(self) -> Tensor:
        """Part, first row, first column and 0 of each, ``[pieces, 4]`` int32."""
        if self._pieces is None:  # the kernel of the CPU cuts its own
            self._pieces = _pieces(self.parts)
        return self._pieces

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: parts, pieces and index, ready for the current stream."""
        found = self.parts, self.pieces, self.index
        if self.stream is not None:
            if torch.cuda.is_current_stream_capturing():
                _captured.add(self)
            elif (stream := torch.cuda.current_stream(self.device)) != self.stream:
                stream.wait_event(self.uploaded_event)
                for tensor in found:
                    tensor.record_stream(stream)
        return found

    def addresses(self, addresses: tuple[int, ...]) -> Tensor:
        """Returns: addresses on the device, ``[n]`` int64, copied unless they and the stream are the last call's."""
        if self.stream is not None and torch.cuda.is_current_stream_capturing():
            _captured.add(self)
            if addresses not in self.replayed:
                self.replayed[addresses] = torch.tensor(addresses, dtype=torch.int64, device="cpu").pin_memory()
            return self.replayed[addresses].to(self.device, non_blocking=True)  # a replay copies again
        key = addresses, None if self.stream is None else torch.cuda.current_stream(self.device)
        pointers = self.pointers  # another thread may exchange them
        if pointers is None or pointers[0] != key:
            on_host = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            pointers = self.pointers = key, on_device(on_host, self.device)
        return pointers[1]


_tables: OrderedDict[tuple, PackTable] = OrderedDict()
_captured: set[PackTable] = set()  # what CUDA graphs read when they are replayed
_lock = threading.Lock()  # backward passes run on threads of their own


def table_of(
    weights: Sequence[Tensor],
    strides: Sequence[tuple[int, ...]],
    rows: Sequence[Tensor | None],
    columns: Sequence[Tensor | None],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> PackTable:
    """The table of a subnet: one of the last :data:`MAX_TABLES`, or a new one, built without a device synchronisation.

    The key holds all that the table depends on, and no address of a weight: storages may be exchanged at any time.

    Args:
        weights: shared weights, for their shapes, dtype and device.
        strides: what to take for their strides.
        rows: the list of active rows of each, None for leading ones. A list is copied into the table.
        columns: likewise.
        sizes: rows, columns, kh', kw' of each part, flat.
        dtype: of the packed side.

    Raises:
        InputError: if a part does not fit its weight, or the table would have to be built while a graph is captured.
    """
    first = weights[0]
    shapes = tuple([weight.shape for weight in weights])
    lists = tuple([None if index is None else (id(index), _version(index)) for index in (*rows, *columns)])
    itemsizes = first.element_size(), dtype.itemsize
    key = shapes, tuple(strides), lists, tuple(sizes), itemsizes, first.device
    with _lock:
        if (table := _tables.get(key)) is not None:
            _tables.move_to_end(key)
            return table
    if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InputError(
            f"a CUDA graph is captured on {first.device}, and these {len(weights)} weights have no table yet; "
            "run this subnet once before the capture"
        )
    of_parts = [tuple(sizes[i : i + 4]) for i in range(0, len(sizes), 4)]
    table = PackTable([tuple(shape) for shape in shapes], strides, rows, columns, of_parts, itemsizes, first.device)
    with _lock:
        _tables[key] = table
        while len(_tables) > MAX_TABLES:
            _tables.popitem(last=False)
    return table


def _version(index: Tensor) -> int:
    return 0 if index.is_inference() else index._version


def aligned(numel: int, itemsize: int) -> int:
    """Returns: elements that a part takes in a flat buffer."""
    unit = ALIGNMENT // itemsize
    return (numel + unit - 1) // unit * unit


def packed_numel(sizes: Sequence[int], itemsize: int) -> int:
    """Returns: elements of a flat buffer of packed weights."""
    return sum(aligned(_product(sizes[i : i + 4]), itemsize) for i in range(0, len(sizes), 4))


def packed_views(buffer: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], offset: int = 0) -> list[Tensor]:
    """Returns: the packed weights in their flat buffer from ``offset`` on, one a part; 4-D ones channels-last."""
    views = []
    for i, weight in enumerate(weights):
        r, c, h, w = sizes[4 * i : 4 * i + 4]
        if weight.dim() == 4:
            size, stride = (r, c, h, w), (h * w * c, 1, w * c, c)
        else:
            size, stride = ((r, c), (c, 1)) if weight.dim() == 2 else ((r,), (1,))
        views.append(buffer.as_strided(size, stride, offset))
        offset += aligned(r * c * h * w, buffer.element_size())
    return views


def dense_views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Returns: the dense gradients in their flat buffer, shaped as the weights, in the layout of dense_strides."""
    views, offset = [], 0
    for weight in like:
        views.append(buffer.as_strided(weight.shape, dense_strides(weight), offset))
        offset += aligned(weight.numel(), buffer.element_size())
    return views


def dense_strides(weight: Tensor) -> tuple[int, ...]:
    """Returns: strides of a dense gradient, in elements: channels-last for a weight that is, else contiguous."""
    shape = weight.shape
    if weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        return (shape[1] * shape[2] * shape[3], 1, shape[3] * shape[1], shape[1])
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _offsets(numels: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    offsets, total = [], 0
    for numel in numels:
        offsets.append(total)
        total += aligned(numel, itemsize)
    return offsets, total


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _check_part(place: int, shape: tuple[int, ...], size: Size4) -> None:
    if len(shape) not in (1, 2, 4):
        raise InputError(f"weight {place} has shape {shape}; give weights of 1, 2 or 4 dimensions")
    whole = (*shape, *(1,) * (4 - len(shape)))
    for what, count, maximum in zip(("rows", "columns"), size, whole, strict=False):
        if not 1 <= count <= maximum:
            raise InputError(
                f"part {place} has {count} {what} but its weight {shape} has {maximum}; take 1 to {maximum}"
            )
    try:
        crop_origin(whole[2:], size[2:])
    except InputError as error:
        raise InputError(f"part {place}: {error}") from None


def _check_list(place: int, what: str, index: Tensor, count: int, maximum: int) -> None:
    if index.dtype != torch.int64 or index.shape != (count,):
        raise InputError(
            f"part {place} lists its {count} {what} in {index.dtype} {tuple(index.shape)}; give int64 [{count}]"
        )
    if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < maximum:
        raise InputError(
            f"part {place} lists {what} from {int(index.min())} to {int(index.max())} but its weight has {maximum}; "
            f"list indices from 0 to {maximum - 1}"
        )


def _joined_lists(lists: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, list[int]]:
    """All lists end to end on the device, ``[n]`` int64, and where each begins; -1 for none."""
    places, total = [], 0
    for index in lists:
        places.append(-1 if index is None else total)
        total += 0 if index is None else index.numel()
    present = [index for index in lists if index is not None]
    if all(index.device.type == "cpu" for index in present):  # one transfer
        joined = torch.cat(present) if present else torch.zeros(1, dtype=torch.int64, device="cpu")
        return on_device(joined, device), places
    return torch.cat([on_device(index, device) for index in present]), places


@functools.lru_cache(maxsize=4096)  # blocks repeat, and subnets share most of their parts
def _fields(
    shape: tuple[int, ...], stride: tuple[int, ...], size: Size4, lists: tuple[int, int], itemsizes: tuple[int, int]
) -> tuple[int, ...]:
    """A row of the table but for its last two numbers."""
    missing = 4 - len(shape)
    rs, cs, ys, xs = (*stride, *(0,) * missing)
    top, left = crop_origin((*shape, *(1,) * missing)[2:], size[2:])
    offset = top * ys + left * xs
    dims = [_Dim("r", size[0], rs, lists[0]), _Dim("y", size[2], ys), _Dim("x", size[3], xs)]
    r, y, x, c = _slots(_merged([*dims, _Dim("c", size[1], cs, lists[1])]))
    mode = _mode((r, y, x, c), offset, itemsizes)
    tile_rows, tile_columns = _tile(mode, r.size, y.size * x.size, c.size)
    sizes = r.size, c.size, y.size, x.size
    return (*sizes, r.stride, c.stride, y.stride, x.stride, offset, r.listed, c.listed, mode, tile_rows, tile_columns)


def _merged(dims: Sequence[_Dim]) -> list[_Dim]:
    """Neighbours that lie in memory like one dimension, joined; those of one element left out.

    Rows are joined only with what is innermost, since taps stay together in a piece.
    """
    merged: list[_Dim] = []  # innermost first
    for dim in reversed([dim for dim in dims if dim.size > 1 or dim.listed >= 0]):
        inner = merged[-1] if merged and not (dim.slot == "r" and len(merged) > 1) else None
        joins = inner and dim.listed < 0 and inner.listed < 0 and dim.stride == inner.size * inner.stride
        if joins and dim.size * inner.size <= MAX_RUN:
            merged[-1] = inner._replace(size=dim.size * inner.size)
        else:
            merged.append(dim)
    return merged[::-1]


def _slots(dims: list[_Dim]) -> tuple[_Dim, ...]:
    """The four slots; what is innermost counts as columns, a single dimension of taps lies in the last one."""
    if dims and dims[-1].slot != "c" and dims[-1].listed < 0:
        dims[-1] = dims[-1]._replace(slot="c")
    found = {dim.slot: dim for dim in dims}
    if "x" not in found and "y" in found:
        found["x"] = found.pop("y")
    return tuple(found.get(slot, _Dim(slot, 1, 1 if slot == "c" else 0)) for slot in "ryxc")


def _mode(dims: tuple[_Dim, ...], offset: int, itemsizes: tuple[int, int]) -> int:
    r, y, x, c = dims
    taps = y.size * x.size
    if c.stride == 1 and c.listed < 0:
        vector = 16 // min(itemsizes)
        steps = [offset, *(dim.stride for dim in (r, y, x) if dim.size > 1 or dim.listed >= 0)]
        wide = c.size % vector == 0 and all(step * itemsizes[0] % 16 == 0 for step in steps)
        return COPY if wide else GATHER
    if taps > 1 and c.stride > x.stride and TURN_CELLS // taps >= 16:
        return TURN
    return GATHER


def _tile(mode: int, rows: int, taps: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a piece: the taps stay together."""
    if mode == TURN:  # a row of taps takes its columns, rounded up, and four cells more
        most = max(8, (TURN_CELLS // taps - 4) // 8 * 8)
    else:
        most = max(64, PIECE // taps // 64 * 64)
    tiles = -(-columns // most)
    width = columns if tiles == 1 else (-(-columns // tiles) + 7) // 8 * 8
    fits = PIECE // (taps * width)
    if mode == TURN:
        fits = min(fits, TURN_CELLS // (taps * ((width + 3) // 4 * 4 + 4)))
    return min(rows, max(1, fits)), width


def _pieces(parts: Tensor) -> Tensor:
    """``[pieces, 4]`` int32: part, first row, first column, 0; in the order of the parts."""
    rows, columns, tile_rows, tile_columns = parts[:, 0], parts[:, 1], parts[:, 12], parts[:, 13]
    across = (columns + tile_columns - 1) // tile_columns  # [P]
    counts = (rows + tile_rows - 1) // tile_rows * across  # [P]
    part = torch.repeat_interleave(torch.arange(len(parts), device="cpu"), counts)  # [pieces]
    local = torch.arange(len(part), device="cpu") - (counts.cumsum(0) - counts)[part]
    row, column = local // across[part] * tile_rows[part], local % across[part] * tile_columns[part]
    return torch.stack([part, row, column, torch.zeros_like(part)], 1).to(torch.int32)
