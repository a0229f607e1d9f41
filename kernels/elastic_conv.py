"""Elastic convolution: the active part of a shared weight, read in place, times slim activations.

The forward is an implicit GEMM of M = N OH OW output positions with K = KH KW Cin. At position (n, p, q)

    y[n, o, p, q] = bias[O(o)] + sum over r, s, c of W[O(o), I(c), r, s] x[n, c, h, w]
        with h = p stride_h + r dilation_h - padding_h and w likewise,

where O and I name the active channels of the supernet: the leading ones, or lists. Only W and bias are
addressed through them; x and y are physically slim.

Leading channels of dense channels-last images, with a weight that can be read in place or has been packed, take the
kernel of ``elastic_levels.py`` as a pyramid of one level: 16-byte copies of x, tensor descriptors on the weight. The
kernel here takes the rest: lists, other layouts, a weight of another dtype.
"""

import torch
import triton
import triton.language as tl

from .elastic_levels import Window, elastic_levels_fwd, fits
from .elastic_pointwise import on_device

# Eight warps are never used: in this version range Triton 3x3 convolutions with 8 or more were seen
# miscompiled.
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit(do_not_specialize=["positions", "height", "width", "out_height", "out_width"])
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
    **Limits**: positions < 2^31. The taps are nested loops with run-time bounds and never one flattened loop.
    """
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
    positions: int, out_channels: int, *, itemsize: int, channels_last: bool, listed: bool, ieee: bool
) -> dict[str, int]:
    """Chooses a tile from a short fixed list, by the whole layer, so that its widths share what is compiled.

    Args:
        positions: N * OH * OW.
        out_channels: output channels of the supernet.
        itemsize: bytes of an element of x.
        channels_last: whether the channels of x lie side by side.
        listed: whether channels are listed and not leading.
        ieee: whether products are exact fp32, which the tensor cores do not do.

    Returns:
        ``BLOCK_M``, ``BLOCK_N`` and ``BLOCK_K``, none of which spills registers on sm_90.
    """
    if ieee:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    block_n = 32 if out_channels <= 32 else 64
    fills_the_gpu = triton.cdiv(positions, 128) * triton.cdiv(out_channels, block_n) >= 132
    block_m = 128 if fills_the_gpu and not (listed and (itemsize == 4 or not channels_last)) else 64
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
    blocks = tile(
        positions,
        whole or weight.shape[0],
        itemsize=x.element_size(),
        channels_last=x.stride(1) == 1,
        listed=in_index is not None or out_index is not None,
        ieee=x.dtype == torch.float32 and not allow_tf32,
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
            PRECISION="tf32" if allow_tf32 else "ieee",
            # Triton's interpreter multiplies bf16 wrongly.
            DOT_IN_FP32=not isinstance(_elastic_conv_fwd_kernel, triton.JITFunction),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, **blocks,
        )  # fmt: skip
