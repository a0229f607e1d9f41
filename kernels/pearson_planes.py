"""The Pearson loss over planes, NCHW: a program works on a chunk of one plane."""

import triton
import triton.language as tl

from .pearson_chunk import VALUES, _beta, _load_tile, _pick, _size, _store_chunk, _store_gradient


@triton.jit
def _plane_chunk(sizes, program, LEVELS: tl.constexpr):
    """Finds the chunk of a program. Sizes of a level: N, C, HW, chunks of a plane, first column in the table.

    Returns: level; first element and end of the chunk in the tensor; its column in the table; the cell of its first
    value and the stride from value to value.
    """
    level, first_cell = 0, tl.cast(0, tl.int64)
    images, channels, area, chunks = _size(sizes, 0), _size(sizes, 1), _size(sizes, 2), _size(sizes, 3)
    first_column = _size(sizes, 4)
    for i in tl.static_range(1, LEVELS):
        programs = images * channels * chunks
        later = program >= programs
        program -= tl.where(later, programs, 0)
        first_cell += tl.where(later, programs, 0).to(tl.int64) * VALUES
        level = tl.where(later, i, level)
        images = tl.where(later, _size(sizes, 5 * i), images)
        channels = tl.where(later, _size(sizes, 5 * i + 1), channels)
        area = tl.where(later, _size(sizes, 5 * i + 2), area)
        chunks = tl.where(later, _size(sizes, 5 * i + 3), chunks)
        first_column = tl.where(later, _size(sizes, 5 * i + 4), first_column)
    plane, chunk = program // chunks, program % chunks
    image, channel = plane // channels, plane % channels
    length = ((area + chunks - 1) // chunks + 15) // 16 * 16
    start = plane.to(tl.int64) * area
    first = start + tl.minimum(chunk.to(tl.int64) * length, area)
    last = start + tl.minimum((chunk + 1).to(tl.int64) * length, area)
    cell = first_cell + (image.to(tl.int64) * chunks + chunk) * VALUES * channels + channel
    return level, first, last, first_column + channel, cell, channels


@triton.jit
def _body_and_edge(first, last, V: tl.constexpr):
    """Cuts [first, last) into whole vectors [start, end) and the edge: offsets [2 V] and their mask."""
    start = (first + V - 1) // V * V
    end = tl.maximum(last // V * V, start)
    i = tl.arange(0, 2 * V)
    edge = tl.where(i < V, first + i, end + i - V)
    mask = edge < tl.where(i < V, tl.minimum(start, last), last)
    return start, end, edge, mask


@triton.jit
def _pearson_plane_stats_kernel(
    s_ptrs, t_ptrs, chunk_ptr, sizes, LEVELS: tl.constexpr, TILE: tl.constexpr, V: tl.constexpr
):
    """Moments of every chunk of every plane, NCHW.

    Grid: one program a chunk, in the order of memory. Reads: S and T once. Writes: ten float32 a chunk.
    Numerics: float32 around the mean of the first tile, see the head of this file. Deterministic: yes.
    Limits: pointers that are not 16-byte aligned compile a variant with narrow loads.
    """
    level, first, last, _, cell, stride = _plane_chunk(sizes, tl.program_id(0), LEVELS)
    s_ptr, t_ptr = _pick(s_ptrs, level, LEVELS), _pick(t_ptrs, level, LEVELS)
    start, end, edge, edge_mask = _body_and_edge(first, last, V)
    rows = tl.arange(0, TILE // V) * V
    lanes = tl.arange(0, V)[None, :]

    mask = (start + rows < end)[:, None]
    at = (start + rows)[:, None] + lanes
    s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s_edge = tl.load(s_ptr + edge, mask=edge_mask, other=0.0).to(tl.float32)
    t_edge = tl.load(t_ptr + edge, mask=edge_mask, other=0.0).to(tl.float32)
    n = tl.maximum(last - first, 1).to(tl.float32)
    seen = tl.maximum(last - first - tl.maximum(end - start - TILE, 0), 1).to(tl.float32)
    shift_s = (tl.sum(s) + tl.sum(s_edge)) / seen
    shift_t = (tl.sum(t) + tl.sum(t_edge)) / seen

    s_edge = tl.where(edge_mask, s_edge - shift_s, 0.0)
    t_edge = tl.where(edge_mask, t_edge - shift_t, 0.0)
    s = tl.where(mask, s - shift_s, 0.0)
    t = tl.where(mask, t - shift_t, 0.0)
    ds, dt = tl.sum(s, 1), tl.sum(t, 1)
    ss, tt = tl.sum(s * s, 1), tl.sum(t * t, 1)
    ss_edge, tt_edge = tl.sum(s_edge * s_edge), tl.sum(t_edge * t_edge)
    beta = _beta(tl.sum(ss) + ss_edge, tl.sum(tt) + tt_edge)
    rest = s - beta * t
    ee, st = tl.sum(rest * rest, 1), tl.sum(s * t, 1)
    for tile in range(start + TILE, end, TILE):
        mask = (tile + rows < end)[:, None]
        at = (tile + rows)[:, None] + lanes
        s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(mask, s - shift_s, 0.0)
        t = tl.where(mask, t - shift_t, 0.0)
        rest = s - beta * t
        ds += tl.sum(s, 1)
        dt += tl.sum(t, 1)
        ss += tl.sum(s * s, 1)
        tt += tl.sum(t * t, 1)
        ee += tl.sum(rest * rest, 1)
        st += tl.sum(s * t, 1)
    rest = s_edge - beta * t_edge
    _store_chunk(
        chunk_ptr + cell, stride, True, n, shift_s, shift_t, beta,
        tl.sum(ds) + tl.sum(s_edge), tl.sum(dt) + tl.sum(t_edge),
        tl.sum(ss) + ss_edge, tl.sum(tt) + tt_edge, tl.sum(ee) + tl.sum(rest * rest),
        tl.sum(st) + tl.sum(s_edge * t_edge),
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["dloss_ptr", "table_ptr"])
def _pearson_plane_grad_kernel(
    x_ptrs, y_ptrs, dout_ptrs, dx_ptrs, dloss_ptr, table_ptr, sizes, columns,
    LEVELS: tl.constexpr, TILE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """``dx = dout + dloss (a (x - mean_x) + b (y - mean_y) + k)``, NCHW; without dout where ``dout_ptrs`` is None.

    Grid: as the statistics. Reads: X, Y and dOut once, five scalars a chunk. Writes: dX once.
    Numerics: float32, rounded once. Deterministic: yes. Limits: as the statistics.
    """
    level, first, last, column, _, _ = _plane_chunk(sizes, tl.program_id(0), LEVELS)
    x_ptr, y_ptr = _pick(x_ptrs, level, LEVELS), _pick(y_ptrs, level, LEVELS)
    dx_ptr = _pick(dx_ptrs, level, LEVELS)
    dout_ptr = None if dout_ptrs is None else _pick(dout_ptrs, level, LEVELS)
    start, end, edge, edge_mask = _body_and_edge(first, last, V)
    x_edge, y_edge, dout_edge = _load_tile(x_ptr, y_ptr, dout_ptr, edge, edge_mask)  # in flight while the body runs
    dloss = tl.load(dloss_ptr)
    a = tl.load(table_ptr + column)
    b = tl.load(table_ptr + columns + column)
    k = tl.load(table_ptr + 2 * columns + column)
    mean_x = tl.load(table_ptr + 3 * columns + column)
    mean_y = tl.load(table_ptr + 4 * columns + column)
    rows = tl.arange(0, TILE // V) * V
    lanes = tl.arange(0, V)[None, :]
    for tile in range(start, end, TILE):
        mask = (tile + rows < end)[:, None]
        at = (tile + rows)[:, None] + lanes
        x, y, dout = _load_tile(x_ptr, y_ptr, dout_ptr, at, mask)
        _store_gradient(dx_ptr, at, mask, x, y, dout, dloss, a, b, k, mean_x, mean_y)
    _store_gradient(dx_ptr, edge, edge_mask, x_edge, y_edge, dout_edge, dloss, a, b, k, mean_x, mean_y)
