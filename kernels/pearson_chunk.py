"""What the kernels of the Pearson loss share: sizes, pointers, a chunk's sums and a tile of the gradient."""

import triton
import triton.language as tl

# Of a chunk: n, shift_s, shift_t, beta, and the sums of d_s, d_t, d_s^2, d_t^2, rest^2 and d_s d_t.
VALUES = tl.constexpr(10)
FAR = tl.constexpr(8.0)  # times the ratio of the deviations: of such a beta the plain sum is nearer
TABLE_ROWS = tl.constexpr(5)  # a, b, k, mean_x, mean_y
MOMENTS = tl.constexpr(6)  # n, mean_s, mean_t, and the centred sums of s^2, t^2, s t


@triton.jit
def _size(sizes, i: tl.constexpr):
    """The i-th size, sent as ``2 x + 3``."""
    return (sizes[i] >> 1) - 1


@triton.jit
def _pick(pointers, level, LEVELS: tl.constexpr):
    """The pointer of a level."""
    pointer = pointers[0]
    for i in tl.static_range(1, LEVELS):
        pointer = tl.where(level == i, pointers[i], pointer)
    return pointer


@triton.jit
def _beta(ss, tt):
    """``sqrt(ss / tt)`` within sane bounds: any positive value is exact but for rounding."""
    live = (ss > 0) & (tt > 0)
    ratio = tl.sqrt(tl.where(live, ss, 1.0) / tl.where(live, tt, 1.0))
    return tl.minimum(tl.maximum(ratio, 1e-15), 1e15)


@triton.jit
def _store_chunk(out, stride, mask, n, shift_s, shift_t, beta, ds, dt, ss, tt, ee, st):
    """Writes what a chunk was summed to; the finish makes moments of it. ``out`` steps by ``stride``."""
    tl.store(out, n, mask=mask)
    tl.store(out + stride, shift_s, mask=mask)
    tl.store(out + 2 * stride, shift_t, mask=mask)
    tl.store(out + 3 * stride, beta, mask=mask)
    tl.store(out + 4 * stride, ds, mask=mask)
    tl.store(out + 5 * stride, dt, mask=mask)
    tl.store(out + 6 * stride, ss, mask=mask)
    tl.store(out + 7 * stride, tt, mask=mask)
    tl.store(out + 8 * stride, ee, mask=mask)
    tl.store(out + 9 * stride, st, mask=mask)


@triton.jit
def _load_chunk(at, stride, mask):
    """Moments of chunks, float64: n, mean_s, mean_t, ss, tt, st; zeros where masked."""
    n = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    shift_s = tl.load(at + stride, mask=mask, other=0.0).to(tl.float64)
    shift_t = tl.load(at + 2 * stride, mask=mask, other=0.0).to(tl.float64)
    beta = tl.load(at + 3 * stride, mask=mask, other=1.0).to(tl.float64)
    ds = tl.load(at + 4 * stride, mask=mask, other=0.0).to(tl.float64)
    dt = tl.load(at + 5 * stride, mask=mask, other=0.0).to(tl.float64)
    ss = tl.load(at + 6 * stride, mask=mask, other=0.0).to(tl.float64)
    tt = tl.load(at + 7 * stride, mask=mask, other=0.0).to(tl.float64)
    ee = tl.load(at + 8 * stride, mask=mask, other=0.0).to(tl.float64)
    plain = tl.load(at + 9 * stride, mask=mask, other=0.0).to(tl.float64)
    rest_s, rest_t = ds / tl.maximum(n, 1.0), dt / tl.maximum(n, 1.0)
    rest = rest_s - beta * rest_t
    ss = tl.maximum(ss - n * rest_s * rest_s, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tt = tl.maximum(tt - n * rest_t * rest_t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    ee -= n * rest * rest
    most = tl.sqrt(ss * tt)
    plain = tl.maximum(plain - n * rest_s * rest_t, -most, propagate_nan=tl.PropagateNan.ALL)
    plain = tl.minimum(plain, most, propagate_nan=tl.PropagateNan.ALL)
    st = tl.where(ee <= FAR * beta * most, (ss + beta * beta * tt - ee) / (2 * beta), plain)
    st = tl.where((ss == 0) | (tt == 0), 0.0, st)
    return n, shift_s + rest_s, shift_t + rest_t, ss, tt, st


@triton.jit
def _load_tile(x_ptr, y_ptr, dout_ptr, at, mask):
    """x, y and dout at offsets ``at``, float32; dout is 0 where ``dout_ptr`` is None."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dout = 0.0
    if dout_ptr is not None:
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x, y, dout


@triton.jit
def _store_gradient(dx_ptr, at, mask, x, y, dout, dloss, a, b, k, mean_x, mean_y):
    dx = dout + dloss * (a * (x - mean_x) + (b * (y - mean_y) + k))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
