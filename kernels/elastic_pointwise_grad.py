"""Gradients of the elastic 1x1 convolution of ``elastic_pointwise.py``: two more GEMMs on the same operands.

    dx[row(m), c] = sum over o of dout[m, o] W[o, c],      dW[o, c] = sum over m of dout[m, o] x[row(m), c]

dx reads the shared weight through the same kind of descriptor. dW is summed over pieces of the positions, each by a
program of its own, and the pieces are added in their order: no atomics, so the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .elastic_pointwise import (
    AOT_KINDS,
    NUM_STAGES,
    NUM_WARPS,
    _image_rows,
    _weight_tile,
    _whole_vectors,
    aot_tiles,
    aot_variant,
    aot_weight,
    on_device,
    settings,
    tile,
    weight_operand,
)

FOLD = {"COLUMNS": 256, "num_warps": 4}


@triton.jit(do_not_specialize=[
    "positions", "in_channels", "out_channels", "weight_row", "height", "width", "out_height", "out_width", "stride",
])  # fmt: skip
def _elastic_pointwise_dx_kernel(
    dout_ptr,  # [N, OH, OW, Cout]
    weight,  # [Cout, Cin] of [Cout_max, Cin_max], a descriptor or a pointer
    dx_ptr,  # [N, H, W, Cin]
    positions,  # M = N * OH * OW
    in_channels, out_channels, weight_row, height, width, out_height, out_width, stride,
    STRIDED: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, DOT_IN_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dx: BLOCK_M positions of BLOCK_N active input channels.

    **Grid**: (cdiv(M, BLOCK_M) * cdiv(Cin, BLOCK_N),), the channel tiles of one row of positions side by side.
    **Reads / Writes**: dout cdiv(Cin, BLOCK_N) times at most, the active weight once per row of tiles; writes dx once
    under output positions, and leaves the pixels between them (STRIDED) as they are.
    **Numerics**: products in the dtype of dout (fp32 as TF32 where PRECISION says so), sums in fp32, rounded once.
    **Deterministic**: yes, one program sums one tile in a fixed order.
    **Limits**: M < 2^30; dout and dx dense channels-last.
    """
    if WIDE:
        in_channels = _whole_vectors(in_channels, V)
        out_channels = _whole_vectors(out_channels, V)
        weight_row = _whole_vectors(weight_row, V)
    tiles_n = tl.cdiv(in_channels, BLOCK_N)
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_dout = m < positions
    k = tl.arange(0, BLOCK_K)
    dout_row = dout_ptr + m.to(tl.int64)[:, None] * out_channels

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, out_channels, BLOCK_K):
        o = start + k
        a = tl.load(dout_row + o[None, :], mask=in_dout[:, None] & (o < out_channels)[None, :], other=0.0)
        b = _weight_tile(weight, start, first_n, out_channels, in_channels, weight_row, TMA, BLOCK_K, BLOCK_N)
        if DOT_IN_FP32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    c = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = _image_rows(m, height, width, out_height, out_width, stride, STRIDED)
    tl.store(
        dx_ptr + row[:, None] * in_channels + c[None, :],
        total.to(dx_ptr.dtype.element_ty),
        mask=in_dout[:, None] & (c < in_channels)[None, :],
    )


@triton.jit(do_not_specialize=[
    "positions", "length", "in_channels", "out_channels", "height", "width", "out_height", "out_width", "stride",
])  # fmt: skip
def _elastic_pointwise_dw_kernel(
    dout_ptr,  # [N, OH, OW, Cout]
    x_ptr,  # [N, H, W, Cin]
    part_ptr,  # [pieces, Cout, Cin] fp32
    positions,  # M = N * OH * OW
    length,  # positions of a piece
    in_channels, out_channels, height, width, out_height, out_width, stride,
    STRIDED: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, DOT_IN_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dW, summed over one piece of the positions: BLOCK_M output by BLOCK_N input channels.

    **Grid**: (cdiv(Cout, BLOCK_M) * cdiv(Cin, BLOCK_N), pieces).
    **Reads / Writes**: dout cdiv(Cin, BLOCK_N) times at most and x cdiv(Cout, BLOCK_M) times; writes Cout Cin fp32 a
    piece.
    **Numerics**: products in the dtype of x (fp32 as TF32 where PRECISION says so), sums in fp32.
    **Deterministic**: yes, one program sums one tile in a fixed order.
    **Limits**: M < 2^30; dout and x dense channels-last.
    """
    if WIDE:
        in_channels = _whole_vectors(in_channels, V)
        out_channels = _whole_vectors(out_channels, V)
    tiles_n = tl.cdiv(in_channels, BLOCK_N)
    piece = tl.program_id(1)
    o = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    is_out, is_in = o < out_channels, c < in_channels
    first = piece * length
    last = tl.minimum(first + length, positions)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        row = _image_rows(m, height, width, out_height, out_width, stride, STRIDED)
        at = m.to(tl.int64)[:, None] * out_channels + o[None, :]
        a = tl.load(dout_ptr + at, mask=(m < last)[:, None] & is_out[None, :], other=0.0)
        at = row[:, None] * in_channels + c[None, :]
        b = tl.load(x_ptr + at, mask=(m < last)[:, None] & is_in[None, :], other=0.0)
        if DOT_IN_FP32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)

    at = (piece.to(tl.int64) * out_channels + o)[:, None] * in_channels + c[None, :]
    tl.store(part_ptr + at, total, mask=is_out[:, None] & is_in[None, :])


@triton.jit(do_not_specialize=["pieces", "in_channels", "out_channels", "dweight_row", "dweight_column"])
def _elastic_pointwise_fold_kernel(
    part_ptr,  # [pieces, Cout, Cin] fp32
    dweight_ptr,  # [Cout_max, Cin_max], any strides
    pieces, in_channels, out_channels, dweight_row, dweight_column,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the pieces of dW in their order and writes the active part of the shared gradient.

    **Grid**: (Cout, cdiv(Cin, COLUMNS)). **Reads / Writes**: every piece once; writes Cout Cin elements, no others.
    **Numerics**: fp32, rounded once to the dtype of the gradient. **Deterministic**: yes. **Limits**: none.
    """
    o = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = c < in_channels
    at = part_ptr + o * in_channels + c
    apart = out_channels.to(tl.int64) * in_channels
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for _ in range(pieces):
        total += tl.load(at, mask=inside, other=0.0)
        at += apart
    at = dweight_ptr + o * dweight_row + c.to(tl.int64) * dweight_column
    tl.store(at, total.to(dweight_ptr.dtype.element_ty), mask=inside)


def pieces(positions: int, tiles: int) -> int:
    """Into how many pieces the positions are cut for dW.

    Args:
        positions: N * OH * OW.
        tiles: of dW.

    Returns:
        Enough to fill an H100 twice, of 512 positions at least; the same on every device, so that the sums are too.
    """
    return max(1, min(triton.cdiv(264, tiles), positions // 512))


def dw_tile(*, itemsize: int, ieee: bool, wide: bool) -> dict[str, int]:
    """Tile of dW: BLOCK_M output by BLOCK_N input channels, BLOCK_K positions at a time; see ``tile``."""
    if ieee:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128 // itemsize if wide else 32}


def elastic_pointwise_dx(
    dout: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, *, stride: int = 1, whole: int = 0,
    allow_tf32: bool = True,
) -> None:  # fmt: skip
    """Launches the gradient with respect to x into ``dx``.

    Args:
        dout: ``[N, Cout, OH, OW]``, fp32, bf16 or fp16, dense channels-last.
        weight: as the forward's.
        dx: ``[N, Cin, H, W]``, dense channels-last, of the dtype of ``dout``; zero where ``stride`` skips pixels.
        stride: 1 or 2, in pixels.
        whole: input channels of the supernet, Cin_max; 0 means those of ``weight``.
        allow_tf32: whether fp32 products may be rounded to TF32.
    """
    out_channels, in_channels = dout.shape[1], dx.shape[1]
    positions = dout.numel() // out_channels
    options = settings((dout, dx), weight, (in_channels, out_channels), allow_tf32)
    blocks = tile(
        positions, whole or weight.shape[1], itemsize=dout.element_size(),
        ieee=dout.dtype == torch.float32 and not allow_tf32, wide=options["WIDE"],
    )  # fmt: skip
    tiles = triton.cdiv(positions, blocks["BLOCK_M"]) * triton.cdiv(in_channels, blocks["BLOCK_N"])
    block = (blocks["BLOCK_K"], blocks["BLOCK_N"])
    with on_device(dout):
        _elastic_pointwise_dx_kernel[(tiles,)](
            dout, weight_operand(weight, (out_channels, in_channels), block, options["TMA"]), dx,
            positions, in_channels, out_channels, weight.stride(0), *dx.shape[2:], *dout.shape[2:], stride,
            STRIDED=stride > 1, **options, **blocks, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip


def elastic_pointwise_dw(
    dout: torch.Tensor, x: torch.Tensor, dweight: torch.Tensor, *, stride: int = 1, allow_tf32: bool = True
) -> None:
    """Launches the gradient with respect to the weight into the active part of ``dweight``; the rest stays as it is.

    Args:
        dout: ``[N, Cout, OH, OW]``, fp32, bf16 or fp16, dense channels-last.
        x: ``[N, Cin, H, W]``, dense channels-last, of the same dtype.
        dweight: ``[Cout_max, Cin_max]`` or larger than the active part, any strides, any floating dtype.
        stride: 1 or 2, in pixels.
        allow_tf32: whether fp32 products may be rounded to TF32.
    """
    out_channels, in_channels = dout.shape[1], x.shape[1]
    positions = dout.numel() // out_channels
    options = settings((x, dout), None, (in_channels, out_channels), allow_tf32)
    blocks = dw_tile(itemsize=x.element_size(), ieee=x.dtype == torch.float32 and not allow_tf32, wide=options["WIDE"])
    tiles = triton.cdiv(out_channels, blocks["BLOCK_M"]) * triton.cdiv(in_channels, blocks["BLOCK_N"])
    count = pieces(positions, tiles)
    length = triton.cdiv(triton.cdiv(positions, count), blocks["BLOCK_K"]) * blocks["BLOCK_K"]
    count = triton.cdiv(positions, length)
    part = x.new_empty((count, out_channels, in_channels), dtype=torch.float32)
    with on_device(x):
        _elastic_pointwise_dw_kernel[(tiles, count)](
            dout, x, part, positions, length, in_channels, out_channels, *x.shape[2:], *dout.shape[2:], stride,
            STRIDED=stride > 1, **options, **blocks, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        _elastic_pointwise_fold_kernel[(out_channels, triton.cdiv(in_channels, FOLD["COLUMNS"]))](
            part, dweight, count, in_channels, out_channels, *dweight.stride()[:2], **FOLD
        )


def aot_variants() -> list[dict]:
    """What the gradients can be compiled for; see ``aot_variants`` of the forward."""
    variants = []
    for dtype, itemsize, precision in AOT_KINDS:
        for label, constants, blocks in aot_tiles(dtype, precision):
            block = [blocks["BLOCK_K"], blocks["BLOCK_N"]]
            pointers = {"dout_ptr": f"*{dtype}", "weight": aot_weight(dtype, block, constants["TMA"])}
            pointers |= {"dx_ptr": f"*{dtype}"}
            settings = {"STRIDED": True} | constants | blocks
            variants.append(aot_variant(f"{label}, strided", _elastic_pointwise_dx_kernel, pointers, settings))
        for wide in (True, False):
            blocks = dw_tile(itemsize=itemsize, ieee=precision == "ieee", wide=wide)
            pointers = {"dout_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "part_ptr": "*fp32"}
            settings = {"STRIDED": True, "WIDE": wide, "V": 16 // itemsize, "PRECISION": precision}
            label = f"{dtype} {precision}{'' if wide else ' narrow'}, strided"
            job = (_elastic_pointwise_dw_kernel, pointers, settings | {"DOT_IN_FP32": False} | blocks)
            variants.append(aot_variant(label, *job))
    for dtype in ("fp32", "bf16", "fp16"):
        pointers = {"part_ptr": "*fp32", "dweight_ptr": f"*{dtype}"}
        variants.append(aot_variant(dtype, _elastic_pointwise_fold_kernel, pointers, FOLD))
    return variants
