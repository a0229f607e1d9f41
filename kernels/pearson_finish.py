"""The end of the Pearson loss's forward: chunks joined, the coefficient table, the loss."""

import triton
import triton.language as tl

from .pearson_chunk import EPS, TABLE_ROWS, VALUES, _load_chunk, _size


@triton.jit
def _gradient_entry(entry, stride, inside, n, mean_x, mean_y, xx, yy, xy, scale):
    """Writes ``a, b, k`` and the rounded means of one side, float32; ``k`` holds what rounding left out."""
    live = n > 1  # one element has no variance: loss and gradient are defined as zero
    degrees = tl.maximum(n - 1, 1.0)
    std_x, std_y = tl.sqrt(xx / degrees), tl.sqrt(yy / degrees)
    big_x, big_y = std_x + EPS, std_y + EPS
    r = xy / (degrees * big_x * big_y)
    a = EPS / (big_x * big_x * big_x) + r / (tl.where(std_x > 0, std_x, 1.0) * big_x)
    a = tl.where(live & (std_x > 0), scale * a / n, 0.0).to(tl.float32)
    b = tl.where(live, -scale / (n * big_x * big_y), 0.0).to(tl.float32)
    shift_x, shift_y = mean_x.to(tl.float32), mean_y.to(tl.float32)
    k = -a.to(tl.float64) * (mean_x - shift_x.to(tl.float64)) - b.to(tl.float64) * (mean_y - shift_y.to(tl.float64))
    tl.store(entry, a, mask=inside)
    tl.store(entry + stride, b, mask=inside)
    tl.store(entry + 2 * stride, k.to(tl.float32), mask=inside)
    tl.store(entry + 3 * stride, shift_x, mask=inside)
    tl.store(entry + 4 * stride, shift_y, mask=inside)


@triton.jit
def _pearson_finish_kernel(
    chunk_ptr, table_ptr, part_ptr, sizes, columns_in_all, loss_weight,
    LEVELS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Joins the chunks of every channel: the coefficient table of both sides and a part of the loss.

    Grid: one program a block of channels of one level. Sizes of a level: chunks a channel, C. Reads: the chunks once.
    Writes: ten float32 a channel, one float64 a program. Numerics: float64, around the mean of the first chunk.
    Deterministic: yes.
    """
    program, first_column, first_cell = tl.program_id(0), 0, tl.cast(0, tl.int64)
    chunks, channels = _size(sizes, 0), _size(sizes, 1)
    for i in tl.static_range(1, LEVELS):
        programs = tl.cdiv(channels, CHANNELS)
        later = program >= programs
        program -= tl.where(later, programs, 0)
        first_column += tl.where(later, channels, 0)
        first_cell += tl.where(later, chunks, 0).to(tl.int64) * VALUES * channels
        chunks = tl.where(later, _size(sizes, 2 * i), chunks)
        channels = tl.where(later, _size(sizes, 2 * i + 1), channels)
    columns = program * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    cells = chunk_ptr + first_cell + columns
    _, shift_s, shift_t, _, _, _ = _load_chunk(cells, channels, inside)
    n = tl.zeros([TILE, CHANNELS], tl.float64)
    ds, dt, ss, tt, st = n, n, n, n, n
    for first in range(0, chunks, TILE):
        chunk = first + tl.arange(0, TILE)
        at = cells[None, :] + chunk[:, None].to(tl.int64) * VALUES * channels
        mask = (chunk < chunks)[:, None] & inside[None, :]
        size, mean_s, mean_t, chunk_ss, chunk_tt, chunk_st = _load_chunk(at, channels, mask)
        gap_s, gap_t = mean_s - shift_s[None, :], mean_t - shift_t[None, :]
        n += size
        ds += size * gap_s
        dt += size * gap_t
        ss += chunk_ss + size * gap_s * gap_s
        tt += chunk_tt + size * gap_t * gap_t
        st += chunk_st + size * gap_s * gap_t
    n = tl.where(inside, tl.sum(n, 0), 1.0)
    ds, dt = tl.sum(ds, 0), tl.sum(dt, 0)
    mean_s, mean_t = shift_s + ds / n, shift_t + dt / n
    ss, tt, st = tl.sum(ss, 0) - ds * ds / n, tl.sum(tt, 0) - dt * dt / n, tl.sum(st, 0) - ds * dt / n
    ss = tl.maximum(ss, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tt = tl.maximum(tt, 0.0, propagate_nan=tl.PropagateNan.ALL)

    scale = tl.cast(loss_weight, tl.float64) / channels
    entry = table_ptr + first_column + columns
    _gradient_entry(entry, columns_in_all, inside, n, mean_s, mean_t, ss, tt, st, scale)
    entry += TABLE_ROWS * columns_in_all
    _gradient_entry(entry, columns_in_all, inside, n, mean_t, mean_s, tt, ss, st, scale)
    degrees = tl.maximum(n - 1, 1.0)
    big_s, big_t = tl.sqrt(ss / degrees) + EPS, tl.sqrt(tt / degrees) + EPS
    loss = ss / (big_s * big_s) + tt / (big_t * big_t) - 2 * st / (big_s * big_t)
    loss = tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL) / (2 * n)
    tl.store(part_ptr + tl.program_id(0), scale * tl.sum(tl.where(inside, loss, 0.0)))


@triton.jit
def _pearson_sum_kernel(part_ptr, loss_ptr, parts, TILE: tl.constexpr):
    """The loss, float32, from its parts. Grid: one program. Deterministic: yes."""
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, parts, TILE):
        at = first + tl.arange(0, TILE)
        total += tl.load(part_ptr + at, mask=at < parts, other=0.0)
    tl.store(loss_ptr, tl.sum(total).to(tl.float32))
