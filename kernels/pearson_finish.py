"""The end of the Pearson loss's forward: chunks joined, moments and the coefficient table, the loss."""

import triton
import triton.language as tl

from .pearson_chunk import MOMENTS, TABLE_ROWS, VALUES, _load_chunk, _size

CONSTANT = tl.constexpr(2.0**-20)  # a deviation below this part of the mean is the rounding of a constant


@triton.jit
def _finish_level(sizes, level, LEVELS: tl.constexpr):
    """Sizes of a level: its place among all, chunks a channel, C, first column in the table.

    Returns: these, and the cell of the level's first value.
    """
    place, chunks, channels, first_column = _size(sizes, 0), _size(sizes, 1), _size(sizes, 2), _size(sizes, 3)
    first_cell = tl.cast(0, tl.int64)
    for i in tl.static_range(1, LEVELS):
        later = level >= i
        first_cell += tl.where(later, chunks, 0).to(tl.int64) * VALUES * channels
        place = tl.where(later, _size(sizes, 4 * i), place)
        chunks = tl.where(later, _size(sizes, 4 * i + 1), chunks)
        channels = tl.where(later, _size(sizes, 4 * i + 2), channels)
        first_column = tl.where(later, _size(sizes, 4 * i + 3), first_column)
    return place, chunks, channels, first_column, first_cell


@triton.jit
def _joined(cells, chunks, stride, inside, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """Joins the chunks of a block of channels, float64: n, mean_s, mean_t, ss, tt, st."""
    _, shift_s, shift_t, _, _, _ = _load_chunk(cells, stride, inside)
    n = tl.zeros([TILE, CHANNELS], tl.float64)
    ds, dt, ss, tt, st = n, n, n, n, n
    for first in range(0, chunks, TILE):
        chunk = first + tl.arange(0, TILE)
        at = cells[None, :] + chunk[:, None].to(tl.int64) * VALUES * stride
        mask = (chunk < chunks)[:, None] & inside[None, :]
        size, mean_s, mean_t, chunk_ss, chunk_tt, chunk_st = _load_chunk(at, stride, mask)
        gap_s, gap_t = mean_s - shift_s[None, :], mean_t - shift_t[None, :]
        n += size
        ds += size * gap_s
        dt += size * gap_t
        ss += chunk_ss + size * gap_s * gap_s
        tt += chunk_tt + size * gap_t * gap_t
        st += chunk_st + size * gap_s * gap_t
    n = tl.where(inside, tl.sum(n, 0), 1.0)
    ds, dt = tl.sum(ds, 0), tl.sum(dt, 0)
    ss, tt, st = tl.sum(ss, 0) - ds * ds / n, tl.sum(tt, 0) - dt * dt / n, tl.sum(st, 0) - ds * dt / n
    ss = tl.maximum(ss, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tt = tl.maximum(tt, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return n, shift_s + ds / n, shift_t + dt / n, ss, tt, st


@triton.jit
def _write_entry(entry, stride, inside, std_x, std_y, mean_x, mean_y, r, scale, eps):
    """Writes ``a, b, k`` and the rounded means of one side, float32; ``k`` holds what rounding left out."""
    big_x, big_y = std_x + eps, std_y + eps
    a = eps / (big_x * big_x * big_x) + r / (tl.where(std_x > 0, std_x, 1.0) * big_x)
    a = tl.where(std_x > 0, scale * a, 0.0).to(tl.float32)
    b = (-scale / (big_x * big_y)).to(tl.float32)
    shift_x, shift_y = mean_x.to(tl.float32), mean_y.to(tl.float32)
    k = -a.to(tl.float64) * (mean_x - shift_x.to(tl.float64)) - b.to(tl.float64) * (mean_y - shift_y.to(tl.float64))
    tl.store(entry, a, mask=inside)
    tl.store(entry + stride, b, mask=inside)
    tl.store(entry + 2 * stride, k.to(tl.float32), mask=inside)
    tl.store(entry + 3 * stride, shift_x, mask=inside)
    tl.store(entry + 4 * stride, shift_y, mask=inside)


@triton.jit(do_not_specialize=["columns_in_all"])
def _pearson_finish_kernel(
    chunk_ptr, moments_ptr, table_ptr, part_ptr, sizes, weights, columns_in_all, eps: tl.float64,
    LEVELS: tl.constexpr, SKIP: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Joins the chunks of every channel: moments, the coefficient table of both sides, parts of the levels' losses.

    Grid: blocks of channels, levels; where a level has fewer channels, the part is zero. Reads: the chunks once.
    Writes: six float64 and ten float32 a channel, one float64 a program. Numerics: float64, around the mean of the
    first chunk; weights are float32. Deterministic: yes.
    """
    block, level = tl.program_id(0), tl.program_id(1)
    place, chunks, channels, first_column, first_cell = _finish_level(sizes, level, LEVELS)
    weight = weights[0]
    for i in tl.static_range(1, LEVELS):
        weight = tl.where(level == i, weights[i], weight)
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    cells = chunk_ptr + first_cell + columns
    n, mean_s, mean_t, ss, tt, st = _joined(cells, chunks, channels, inside, TILE, CHANNELS)

    out = moments_ptr + first_column + columns
    tl.static_assert(MOMENTS == 6)
    tl.store(out, n, mask=inside)
    tl.store(out + columns_in_all, mean_s, mask=inside)
    tl.store(out + 2 * columns_in_all, mean_t, mask=inside)
    tl.store(out + 3 * columns_in_all, ss, mask=inside)
    tl.store(out + 4 * columns_in_all, tt, mask=inside)
    tl.store(out + 5 * columns_in_all, st, mask=inside)

    degrees = tl.maximum(n - 1, 1.0)
    std_s, std_t = tl.sqrt(ss / degrees), tl.sqrt(tt / degrees)
    counted = n > 1  # one element has no variance: loss and gradient are defined as zero
    if SKIP:  # never where a deviation is NaN
        constant = (std_s <= CONSTANT * tl.abs(mean_s)) | (std_t <= CONSTANT * tl.abs(mean_t))
        counted = counted & (constant == 0)
    scale = tl.where(counted, tl.cast(weight, tl.float64) / channels / n, 0.0)
    big_s, big_t = std_s + eps, std_t + eps
    cross = st / (big_s * big_t)
    entry = table_ptr + first_column + columns
    _write_entry(entry, columns_in_all, inside, std_s, std_t, mean_s, mean_t, cross / degrees, scale, eps)
    entry += TABLE_ROWS * columns_in_all
    _write_entry(entry, columns_in_all, inside, std_t, std_s, mean_t, mean_s, cross / degrees, scale, eps)
    loss = ss / (big_s * big_s) + tt / (big_t * big_t) - 2 * cross
    loss = scale * tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL) / 2
    part = place.to(tl.int64) * tl.num_programs(0) + block
    tl.store(part_ptr + part, tl.sum(tl.where(inside, loss, 0.0)))


@triton.jit(do_not_specialize=["parts"])
def _pearson_sum_kernel(
    part_ptr, losses_ptr, loss_ptr, parts, LEVELS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """The levels' losses, and their sum, from ``parts`` parts of each. Grid: one program. Reads: the parts once.

    Numerics: float64, rounded once. Deterministic: yes.
    """
    level = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, TILE], tl.float64)
    for first in range(0, parts, TILE):
        at = first + tl.arange(0, TILE)
        mask = (level < LEVELS)[:, None] & (at < parts)[None, :]
        total += tl.load(part_ptr + level[:, None] * parts + at[None, :], mask=mask, other=0.0)
    losses = tl.sum(total, 1)
    tl.store(losses_ptr + level, losses.to(tl.float32), mask=level < LEVELS)
    tl.store(loss_ptr, tl.sum(losses, 0).to(tl.float32))
