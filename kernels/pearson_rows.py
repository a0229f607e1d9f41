"""The Pearson loss over rows of channels, channels-last: a program works on a chunk of rows and a block of channels."""

import triton
import triton.language as tl

from .pearson_chunk import VALUES, _beta, _load_tile, _pick, _size, _store_chunk, _store_gradient


@triton.jit
def _row_chunk(sizes, program, LEVELS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr):
    """Finds the chunk of a program. Sizes of a level: N H W, C, rows of a chunk, first column in the table.

    Returns: level, first row and end of the chunk, its columns in the level [CHANNELS] and their number, the first
    column of the level in the table, and the cell of its first value.
    """
    level, first_cell = 0, tl.cast(0, tl.int64)
    positions, channels, length, first_column = _size(sizes, 0), _size(sizes, 1), _size(sizes, 2), _size(sizes, 3)
    for i in tl.static_range(1, LEVELS):
        chunks = tl.cdiv(positions, length)
        programs = chunks * tl.cdiv(channels, CHANNELS)
        later = program >= programs
        program -= tl.where(later, programs, 0)
        first_cell += tl.where(later, chunks, 0).to(tl.int64) * VALUES * channels
        level = tl.where(later, i, level)
        positions = tl.where(later, _size(sizes, 4 * i), positions)
        channels = tl.where(later, _size(sizes, 4 * i + 1), channels)
        length = tl.where(later, _size(sizes, 4 * i + 2), length)
        first_column = tl.where(later, _size(sizes, 4 * i + 3), first_column)
    blocks = tl.cdiv(channels, CHANNELS)
    chunk, block = program // blocks, program % blocks
    if WIDE:
        channels = channels // V * V  # changes nothing, but says so to the compiler
        first_column = first_column // V * V
    first = chunk.to(tl.int64) * length
    last = tl.minimum(first + length, positions)
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    cell = first_cell + chunk.to(tl.int64) * VALUES * channels
    return level, first, last, columns, channels, first_column, cell


@triton.jit
def _pearson_row_stats_kernel(
    s_ptrs, t_ptrs, chunk_ptr, sizes,
    LEVELS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Moments of every chunk of rows and block of channels, channels-last.

    Grid: one program a chunk and block, blocks fastest. Reads: S and T once. Writes: ten float32 a chunk and channel.
    Numerics: float32 around the mean of the first tile, per channel. Deterministic: yes.
    Limits: loads are narrow unless C is a multiple of V (``WIDE``).
    """
    level, first, last, columns, channels, _, cell = _row_chunk(sizes, tl.program_id(0), LEVELS, CHANNELS, WIDE, V)
    s_ptr, t_ptr = _pick(s_ptrs, level, LEVELS), _pick(t_ptrs, level, LEVELS)
    rows = first + tl.arange(0, TILE)
    inside = columns < channels
    at = rows[:, None] * channels + columns[None, :]
    step = TILE * channels
    mask = (rows < last)[:, None] & inside[None, :]
    s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at += step
    mask_next = (rows + TILE < last)[:, None] & inside[None, :]
    s_next = tl.load(s_ptr + at, mask=mask_next, other=0.0)  # always one tile ahead
    t_next = tl.load(t_ptr + at, mask=mask_next, other=0.0)
    seen = tl.minimum(last - first, TILE).to(tl.float32)
    shift_s, shift_t = tl.sum(s, 0) / seen, tl.sum(t, 0) / seen
    ds = tl.where(mask, s - shift_s[None, :], 0.0)
    dt = tl.where(mask, t - shift_t[None, :], 0.0)
    ss, tt = ds * ds, dt * dt
    beta = _beta(tl.sum(ss, 0), tl.sum(tt, 0))
    rest = ds - beta[None, :] * dt
    ee, st = rest * rest, ds * dt
    for tile in range(first + TILE, last, TILE):
        mask = mask_next
        s, t = s_next.to(tl.float32), t_next.to(tl.float32)
        at += step
        mask_next = (tile + TILE + tl.arange(0, TILE) < last)[:, None] & inside[None, :]
        s_next = tl.load(s_ptr + at, mask=mask_next, other=0.0)
        t_next = tl.load(t_ptr + at, mask=mask_next, other=0.0)
        s = tl.where(mask, s - shift_s[None, :], 0.0)
        t = tl.where(mask, t - shift_t[None, :], 0.0)
        rest = s - beta[None, :] * t
        ds += s
        dt += t
        ss += s * s
        tt += t * t
        ee += rest * rest
        st += s * t
    n = tl.full([CHANNELS], 0.0, tl.float32) + (last - first).to(tl.float32)
    _store_chunk(
        chunk_ptr + cell + columns, channels, inside, n, shift_s, shift_t, beta,
        tl.sum(ds, 0), tl.sum(dt, 0), tl.sum(ss, 0), tl.sum(tt, 0), tl.sum(ee, 0), tl.sum(st, 0),
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns_in_all"], do_not_specialize_on_alignment=["dloss_ptr"])
def _pearson_row_grad_kernel(
    x_ptrs, y_ptrs, dout_ptrs, dx_ptrs, dloss_ptr, table_ptr, sizes, columns_in_all,
    LEVELS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """``dx = dout + dloss (a (x - mean_x) + b (y - mean_y) + k)``, channels-last; no dout if ``dout_ptrs`` is None.

    Grid: as the statistics. Reads: X, Y and dOut once, five scalars a channel. Writes: dX once.
    Numerics: float32, rounded once. Deterministic: yes. Limits: as the statistics.
    """
    level, first, last, columns, channels, first_column, _ = _row_chunk(
        sizes, tl.program_id(0), LEVELS, CHANNELS, WIDE, V
    )
    x_ptr, y_ptr = _pick(x_ptrs, level, LEVELS), _pick(y_ptrs, level, LEVELS)
    dx_ptr = _pick(dx_ptrs, level, LEVELS)
    dout_ptr = None if dout_ptrs is None else _pick(dout_ptrs, level, LEVELS)
    inside = columns < channels
    if WIDE:
        columns_in_all = columns_in_all // V * V
    entry = table_ptr + first_column + columns
    dloss = tl.load(dloss_ptr)
    a = tl.load(entry, mask=inside, other=0.0)[None, :]
    b = tl.load(entry + columns_in_all, mask=inside, other=0.0)[None, :]
    k = tl.load(entry + 2 * columns_in_all, mask=inside, other=0.0)[None, :]
    mean_x = tl.load(entry + 3 * columns_in_all, mask=inside, other=0.0)[None, :]
    mean_y = tl.load(entry + 4 * columns_in_all, mask=inside, other=0.0)[None, :]
    at = (first + tl.arange(0, TILE))[:, None] * channels + columns[None, :]
    for tile in range(first, last, TILE):
        mask = (tile + tl.arange(0, TILE) < last)[:, None] & inside[None, :]
        x, y, dout = _load_tile(x_ptr, y_ptr, dout_ptr, at, mask)
        _store_gradient(dx_ptr, at, mask, x, y, dout, dloss, a, b, k, mean_x, mean_y)
        at += TILE * channels
