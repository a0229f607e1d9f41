"""Elastic convolution: the active part of a shared weight, read in place, times slim activations.

The forward is an implicit GEMM of M = N OH OW output positions with K = KH KW Cin. At position (n, p, q)

    y[n, o, p, q] = bias[O(o)] + sum over r, s, c of W[O(o), I(c), r, s] x[n, c, h, w]
        with h = p stride_h + r dilation_h - padding_h and w likewise,

where O and I name the active channels of the supernet: the leading ones, or lists. Only W and bias are
addressed through them; x and y are physically slim.

Leading channels of dense channels-last images, with a weight that can be read in place or has been packed, take the
kernel of ``elastic_levels.py`` as a pyramid of one level: 16-byte copies of x, tensor descriptors on the weight. The
kernel here takes the rest: lists, other layouts, a weight of another dtype.

Sizes, widths and strides are ordinary arguments. What is compiled depends on the dtypes, the epilogue, the tile, which
tensors have their channels side by side (``X_LAST``, ``W_LAST``, ``Y_LAST``) and on one property of the widths: whether
all rows that are read or written are whole 16-byte vectors (``WIDE``).
"""

import torch
import triton
import triton.language as tl

from .elastic_levels import Window, elastic_levels_fwd, fits
from .elastic_pointwise import _whole_vectors, on_device

# Eight warps are never used: in this version range Triton 3x3 convolutions with 8 or more were seen
# miscompiled.
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit(do_not_specialize=[
    "positions", "in_channels", "out_channels", "height", "width", "out_height", "out_width",
    "x_n", "x_c", "x_h", "x_w", "w_o", "w_i", "w_r", "w_s", "y_n", "y_c", "y_h", "y_w",
    "kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w",
], do_not_specialize_on_alignment=["bias_ptr", "in_index_ptr", "out_index_ptr"])  # fmt: skip
def _elastic_conv_fwd_kernel(
    x_ptr,  # [N, Cin, H, W], any strides
    weight_ptr,  # [Cout_max, Cin_max, KH, KW], any strides
    bias_ptr,  # [Cout_max]
    y_ptr,  # [N, Cout, OH, OW], any strides
    in_index_ptr,  # [Cin] int64
    out_index_ptr,  # [Cout] int64
    positions,  # N * OH * OW
    in_channels,
    out_channels,
    height,
    width,
    out_height,
    out_width,
    x_n, x_c, x_h, x_w,
    w_o, w_i, w_r, w_s,
    y_n, y_c, y_h, y_w,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    IN_LISTED: tl.constexpr,
    OUT_LISTED: tl.constexpr,
    X_LAST: tl.constexpr,
    W_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y: BLOCK_M positions of BLOCK_N active output channels.

    **Grid**: (cdiv(positions, BLOCK_M) * cdiv(Cout, BLOCK_N),), the channel tiles of one row of positions
    side by side, so that they find x in the L2.
    **Reads / Writes**: x KH KW cdiv(Cout, BLOCK_N) times at most (neighbouring taps hit the L1), the active
    weight once per row of tiles; writes y once.
    **Numerics**: products in the dtype of x (the weight is cast after the load; fp32 as TF32 where PRECISION
    says so), sums, bias and ReLU in fp32, rounded once.
    **Deterministic**: yes, one program sums one tile in a fixed order.
    **Limits**: positions < 2^30. The taps are nested loops with run-time bounds and never one flattened loop.
    """
    if W_LAST:
        w_i = 1
    if WIDE:
        in_channels, out_channels = _whole_vectors(in_channels, V), _whole_vectors(out_channels, V)
        if X_LAST:
            x_c = 1
            x_n, x_h, x_w = _whole_vectors(x_n, V), _whole_vectors(x_h, V), _whole_vectors(x_w, V)
        if W_LAST and not IN_LISTED:
            w_o, w_r, w_s = _whole_vectors(w_o, V), _whole_vectors(w_r, V), _whole_vectors(w_s, V)
        if Y_LAST:
            y_c = 1
            y_n, y_h, y_w = _whole_vectors(y_n, V), _whole_vectors(y_h, V), _whole_vectors(y_w, V)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_y = m < positions
    n = m // (out_height * out_width)
    p = (m // out_width) % out_height
    q = m % out_width
    first_h = p * stride_h - padding_h
    first_w = q * stride_w - padding_w
    x_image = x_ptr + n.to(tl.int64) * x_n

    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    is_out = o < out_channels
    row = o.to(tl.int64)
    if OUT_LISTED:
        row = tl.load(out_index_ptr + o, mask=is_out, other=0)
    weight_row = weight_ptr + row * w_o
    k = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(kernel_h):
        h = first_h + r * dilation_h
        for s in range(kernel_w):
            w = first_w + s * dilation_w
            inside = in_y & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x_pixel = x_image + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
            weight_tap = weight_row + (r * w_r + s * w_s)
            for start in range(0, in_channels, BLOCK_K):
                c = start + k
                is_in = c < in_channels
                column = c.to(tl.int64)
                if IN_LISTED:
                    column = tl.load(in_index_ptr + c, mask=is_in, other=0)
                a = tl.load(
                    x_pixel[:, None] + c.to(tl.int64)[None, :] * x_c,
                    mask=inside[:, None] & is_in[None, :],
                    other=0.0,
                )  # [BLOCK_M, BLOCK_K]
                b = tl.load(
                    weight_tap[None, :] + column[:, None] * w_i,
                    mask=is_in[:, None] & is_out[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_N]
                b = b.to(a.dtype)
                if DOT_IN_FP32:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                total = tl.dot(a, b, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=is_out, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y_pixel = y_ptr + n.to(tl.int64) * y_n + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
    tl.store(
        y_pixel[:, None] + o.to(tl.int64)[None, :] * y_c,
        total.to(y_ptr.dtype.element_ty),
        mask=in_y[:, None] & is_out[None, :],
    )


def tile(
    positions: int, out_channels: int, *, itemsize: int, channels_last: bool, listed: bool, ieee: bool, wide: bool
) -> dict[str, int]:
    """Chooses a tile from a short fixed list, by the whole layer, so that its widths share what is compiled.

    Args:
        positions: N * OH * OW.
        out_channels: output channels of the supernet.
        itemsize: bytes of an element of x or of the weight, whichever is larger.
        channels_last: whether the channels of x lie side by side.
        listed: whether channels are listed and not leading.
        ieee: whether products are exact fp32, which the tensor cores do not do.
        wide: whether rows of channels are whole 16-byte vectors.

    Returns:
        ``BLOCK_M``, ``BLOCK_N`` and ``BLOCK_K``, none of which spills registers on sm_90.
    """
    if ieee:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    block_n = 32 if out_channels <= 32 else 64
    fills_the_gpu = triton.cdiv(positions, 128) * triton.cdiv(out_channels, block_n) >= 132
    block_m = 128 if fills_the_gpu and not (listed and (itemsize == 4 or not channels_last)) else 64
    if not wide or (block_m == 64 and itemsize == 4 and not channels_last):
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}
    deep = itemsize == 2 and channels_last and not listed
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64 if deep else 32}


def elastic_conv_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    in_index: torch.Tensor | None,
    out_index: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    allow_tf32: bool,
    *,
    relu: bool = False,
    whole: int = 0,
) -> None:
    """Launches the forward into ``y``.

    Args:
        x: ``[N, Cin, H, W]``, fp32, bf16 or fp16, any strides.
        weight: ``[Cout_max, Cin_max, kh, kw]``, any strides; cast to the dtype of ``x`` on chip.
        bias: ``[Cout_max]`` or None.
        y: ``[N, Cout, OH, OW]``, any strides, same dtype as ``x``; overwritten.
        in_index: ``[Cin]`` int64 on the device, or None for the leading channels.
        out_index: ``[Cout]`` int64 on the device, or None for the leading channels.
        stride: step of the window (vertical, horizontal), in pixels.
        padding: zeros on each side (vertical, horizontal), in pixels.
        dilation: distance between taps (vertical, horizontal), in pixels.
        allow_tf32: whether fp32 products may be rounded to TF32.
        relu: whether negative values become zero.
        whole: output channels of the supernet, Cout_max; 0 means those of ``weight``.
    """
    if in_index is None and out_index is None and fits([x], [y], weight):
        window = Window(tuple(stride), tuple(padding), tuple(dilation))
        elastic_levels_fwd([x], weight, bias, [y], window, relu=relu, whole=whole, allow_tf32=allow_tf32)
        return
    batch, out_channels, out_height, out_width = y.shape
    positions = batch * out_height * out_width
    vector = 16 // x.element_size()
    by_rows = (x, y, weight) if in_index is None else (x, y)
    wide = x.shape[1] % vector == out_channels % vector == 0 and all(_in_vectors(t, vector) for t in by_rows)
    blocks = tile(
        positions,
        whole or weight.shape[0],
        itemsize=max(x.element_size(), weight.element_size()),
        channels_last=x.stride(1) == 1,
        listed=in_index is not None or out_index is not None,
        ieee=x.dtype == torch.float32 and not allow_tf32,
        wide=wide,
    )
    grid = (triton.cdiv(positions, blocks["BLOCK_M"]) * triton.cdiv(out_channels, blocks["BLOCK_N"]),)
    with on_device(x):
        _elastic_conv_fwd_kernel[grid](
            x, weight, weight if bias is None else bias, y,
            weight if in_index is None else in_index, weight if out_index is None else out_index,
            positions, x.shape[1], out_channels, x.shape[2], x.shape[3], out_height, out_width,
            *x.stride(), *weight.stride(), *y.stride(),
            weight.shape[2], weight.shape[3], *stride, *padding, *dilation,
            HAS_BIAS=bias is not None, RELU=relu, IN_LISTED=in_index is not None, OUT_LISTED=out_index is not None,
            X_LAST=x.stride(1) == 1, W_LAST=weight.stride(1) == 1, Y_LAST=y.stride(1) == 1, WIDE=wide, V=vector,
            PRECISION="tf32" if allow_tf32 else "ieee",
            # Triton's interpreter multiplies bf16 wrongly.
            DOT_IN_FP32=not isinstance(_elastic_conv_fwd_kernel, triton.JITFunction),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, **blocks,
        )  # fmt: skip


def _in_vectors(tensor: torch.Tensor, vector: int) -> bool:
    """Whether rows of channels begin at multiples of ``vector`` elements, where channels lie side by side at all."""
    steps = [tensor.stride(dim) for dim in (0, 2, 3) if tensor.shape[dim] > 1]
    return tensor.stride(1) != 1 or all(step % vector == 0 for step in steps)
