"""Elastic convolution of dense channels-last images, all levels of a pyramid in one launch, as an implicit GEMM.

A head shared by P3 to P7 convolves five images with one weight. Level by level, with M = N OH OW output positions,

    y[m, o] = act(bias[o] + sum over r, s, c of W[o, c, r, s] x[pixel(m, r, s), c]),    o < Cout of Cout_max, c < Cin

Launched level by level, the small ones leave most of the GPU idle and every level ends in a wave of its own; here the
tiles of all levels are one grid. One level is the fast path of ``elastic_conv.py``.

The weight is read in place, KRSC, with the strides of the shared tensor: on sm_90 and later through a tensor descriptor
of shape [KH, KW, Cout, Cin], of which what lies outside reads as zero and is never fetched; elsewhere through pointers.

Widths and sizes are ordinary arguments. What is compiled depends on the dtype, the epilogue, the number of levels, the
size of the whole layer (one of three tiles) and on whether rows of x and of y are whole 16-byte vectors (``WIDE``,
``WIDE_Y``). Sizes of levels travel as odd numbers in a tuple, see ``pearson.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .elastic_pointwise import _whole_vectors, has_tma, on_device
from .pearson_chunk import _pick, _size

# Never eight: in this version range convolutions with eight warps or more were seen miscompiled.
NUM_WARPS = 4
NUM_STAGES = 3
MAX_PIXELS = 2**30 - 2  # of a level, at its input and at its output


@triton.jit
def _weight_tap(
    weight, r, s, row, column, rows, columns, w_o, w_r, w_s,
    TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of the active weight under one tap; zero outside of it."""
    if TMA:
        tile = weight.load([r, s, row, column]).reshape(ROWS, COLUMNS)
    else:
        o = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        tile = tl.load(
            weight + o.to(tl.int64)[:, None] * w_o + (r * w_r + s * w_s) + c[None, :],
            mask=(o < rows)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
    return tile


@triton.jit
def _level_tile(sizes, tile, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Finds the tile of positions of a program. Sizes of a level: N OH OW, H, W, OH, OW.

    Returns: level, tile within the level, and its sizes.
    """
    level = 0
    positions, height, width = _size(sizes, 0), _size(sizes, 1), _size(sizes, 2)
    out_height, out_width = _size(sizes, 3), _size(sizes, 4)
    for i in tl.static_range(1, LEVELS):
        tiles = tl.cdiv(positions, BLOCK_M)
        later = tile >= tiles
        tile -= tl.where(later, tiles, 0)
        level = tl.where(later, i, level)
        positions = tl.where(later, _size(sizes, 5 * i), positions)
        height = tl.where(later, _size(sizes, 5 * i + 1), height)
        width = tl.where(later, _size(sizes, 5 * i + 2), width)
        out_height = tl.where(later, _size(sizes, 5 * i + 3), out_height)
        out_width = tl.where(later, _size(sizes, 5 * i + 4), out_width)
    return level, tile, positions, height, width, out_height, out_width


@triton.jit(do_not_specialize=[
    "in_channels", "out_channels", "w_o", "w_r", "w_s", "kernel_h", "kernel_w", "stride_h", "stride_w",
    "padding_h", "padding_w", "dilation_h", "dilation_w",
], do_not_specialize_on_alignment=["bias_ptr"])  # fmt: skip
def _elastic_levels_fwd_kernel(
    x_ptrs,  # per level [N, H, W, Cin]
    weight,  # [KH, KW, Cout, Cin] of [Cout_max, Cin_max, KH, KW]: a descriptor or a pointer
    bias_ptr,  # [Cout_max], or None
    y_ptrs,  # per level [N, OH, OW, Cout]
    sizes,  # five per level
    in_channels, out_channels, w_o, w_r, w_s, kernel_h, kernel_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    LEVELS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, WIDE_Y: tl.constexpr, V: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, DOT_IN_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one level of y: BLOCK_M positions of BLOCK_N active output channels.

    **Grid**: (sum over levels of cdiv(N OH OW, BLOCK_M) * cdiv(Cout, BLOCK_N),), the channel tiles of one row of
    positions side by side, so that they find x in the L2.
    **Reads / Writes**: x KH KW cdiv(Cout, BLOCK_N) times at most, from the L2 all but once; the active weight once per
    row of tiles; writes y once.
    **Numerics**: products in the dtype of x (fp32 as TF32 where PRECISION says so), sums, bias and ReLU in fp32,
    rounded once.
    **Deterministic**: yes, one program sums one tile in a fixed order.
    **Limits**: N H W and N OH OW < 2^30; x and y dense channels-last. The taps are nested loops with run-time bounds,
    never one flattened loop.
    """
    if WIDE:
        in_channels = _whole_vectors(in_channels, V)
        w_o, w_r, w_s = _whole_vectors(w_o, V), _whole_vectors(w_r, V), _whole_vectors(w_s, V)
    if WIDE_Y:
        out_channels = _whole_vectors(out_channels, V)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    level, tile_m, positions, height, width, out_height, out_width = _level_tile(
        sizes, tl.program_id(0) // tiles_n, LEVELS, BLOCK_M
    )
    x_ptr, y_ptr = _pick(x_ptrs, level, LEVELS), _pick(y_ptrs, level, LEVELS)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_y = m < positions
    n = m // (out_height * out_width)
    first_h = m // out_width % out_height * stride_h - padding_h
    first_w = m % out_width * stride_w - padding_w
    first_h = tl.where(in_y, first_h, -height - kernel_h * dilation_h)  # outside under every tap
    first = (n * height + first_h) * width + first_w  # pixel under the first tap
    k = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(kernel_h):
        h = first_h + r * dilation_h
        for s in range(kernel_w):
            w = first_w + s * dilation_w
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            pixel = first + (r * dilation_h * width + s * dilation_w)
            x_pixel = x_ptr + pixel.to(tl.int64)[:, None] * in_channels
            for start in range(0, in_channels, BLOCK_K):
                c = start + k
                a = tl.load(x_pixel + c[None, :], mask=inside[:, None] & (c < in_channels)[None, :], other=0.0)
                b = _weight_tap(
                    weight, r, s, first_n, start, out_channels, in_channels, w_o, w_r, w_s, TMA, BLOCK_N, BLOCK_K
                )
                if DOT_IN_FP32:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                total = tl.dot(a, b.T, total, input_precision=PRECISION)

    o = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    is_out = o < out_channels
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=is_out, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = m.to(tl.int64)[:, None] * out_channels + o[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=in_y[:, None] & is_out[None, :])


class Window(NamedTuple):
    """How a kernel moves over an image; vertical, horizontal, in pixels."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


def tile(positions: int, channels: int, *, itemsize: int, ieee: bool, wide: bool, tma: bool) -> dict[str, int]:
    """Chooses a tile from a short fixed list, by the whole layer, so that its widths share what is compiled.

    Args:
        positions: N * OH * OW, all levels together.
        channels: output channels of the supernet.
        itemsize: bytes of an element of x.
        ieee: whether products are exact fp32, which the tensor cores do not do.
        wide: whether rows of x are whole 16-byte vectors.
        tma: whether the weight comes through a descriptor.

    Returns:
        ``BLOCK_M``, ``BLOCK_N`` and ``BLOCK_K``, none of which spills registers on sm_90.
    """
    if ieee:
        return {"BLOCK_M": 64 if wide else 32, "BLOCK_N": 32, "BLOCK_K": 16}
    if not wide:
        return {"BLOCK_M": 64, "BLOCK_N": 64 if tma else 32, "BLOCK_K": 32}
    depth = 128 // itemsize
    for rows in (128, 64) if tma else (64,):
        # Twice the multiprocessors of an H100, so that half the channels fill it too.
        if channels > 64 and triton.cdiv(positions, rows) * triton.cdiv(channels, 128) >= 264:
            return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": depth}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": depth}


def readable_in_place(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can read a weight where it lies.

    Args:
        weight: ``[Cout_max, Cin_max, kh, kw]``, the centre of a larger kernel too.
        dtype: of the activations.

    Returns:
        True if it has their dtype, input channels side by side and, where a descriptor reads it, base and strides at
        multiples of 16 bytes.
    """
    if weight.dtype != dtype or weight.stride(1) != 1:
        return False
    return not has_tma(weight.device) or _in_vectors(weight)


def _in_vectors(weight: torch.Tensor) -> bool:
    strides = _weight_strides(weight)
    return weight.data_ptr() % 16 == 0 and all(stride * weight.element_size() % 16 == 0 for stride in strides)


def _weight_strides(weight: torch.Tensor) -> list[int]:
    """Steps between taps, vertical and horizontal, and output channels; any will do for a single tap."""
    w_o = weight.stride(0)
    return [w_o if weight.shape[dim] == 1 else weight.stride(dim) for dim in (2, 3)] + [w_o]


def fits(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether the kernel takes these images, dense channels-last both, and this weight as they lie."""
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (*xs, *ys))
    return dense and small(xs, ys) and readable_in_place(weight, xs[0].dtype)


def small(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel can count the pixels of every level."""
    return all(t.shape[0] * t.shape[2] * t.shape[3] <= MAX_PIXELS for t in (*xs, *ys))


def elastic_levels_fwd(
    xs: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None, ys: Sequence[torch.Tensor],
    window: Window, *, relu: bool = False, whole: int = 0, allow_tf32: bool = True,
) -> None:  # fmt: skip
    """Launches the forward of all levels into ``ys``.

    Args:
        xs: levels ``[N, Cin, H, W]``, fp32, bf16 or fp16, dense channels-last; see :func:`fits`.
        weight: ``[Cout_max, Cin_max, kh, kw]`` of the same dtype, see :func:`readable_in_place`; or a packed copy of
            its active part. At least ``[Cout, Cin]``.
        bias: ``[Cout_max]`` or longer than Cout, any floating dtype; or None.
        ys: levels ``[N, Cout, OH, OW]``, dense channels-last, of the dtype of ``xs``; overwritten.
        window: stride, padding and dilation.
        relu: whether negative values become zero.
        whole: output channels of the supernet, Cout_max; 0 means those of ``weight``.
        allow_tf32: whether fp32 products may be rounded to TF32.
    """
    pairs = sorted(zip(xs, ys, strict=True), key=lambda pair: -pair[1].numel())  # the largest first: it fills the GPU
    pairs = [pair for pair in pairs if pair[1].numel()]
    if not pairs:
        return
    xs, ys = zip(*pairs, strict=True)
    in_channels, out_channels = xs[0].shape[1], ys[0].shape[1]
    options = settings(xs, ys, weight, allow_tf32)
    positions = [y.numel() // out_channels for y in ys]
    blocks = tile(
        sum(positions), whole or weight.shape[0], itemsize=xs[0].element_size(), wide=options["WIDE"],
        ieee=options["PRECISION"] == "ieee", tma=options["TMA"],
    )  # fmt: skip
    programs = sum(triton.cdiv(m, blocks["BLOCK_M"]) for m in positions) * triton.cdiv(out_channels, blocks["BLOCK_N"])
    w_r, w_s, w_o = _weight_strides(weight)
    operand = weight
    if options["TMA"]:
        shape, block = [*weight.shape[2:], out_channels, in_channels], [1, 1, blocks["BLOCK_N"], blocks["BLOCK_K"]]
        operand = TensorDescriptor(weight, shape, [w_r, w_s, w_o, 1], block)
    with on_device(xs[0]):
        _elastic_levels_fwd_kernel[(programs,)](
            xs, operand, bias, ys, _odd(xs, ys, positions), in_channels, out_channels, w_o, w_r, w_s,
            *weight.shape[2:], *window.stride, *window.padding, *window.dilation,
            LEVELS=len(xs), RELU=relu, **options, **blocks, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip


def settings(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], weight: torch.Tensor, allow_tf32: bool) -> dict:
    """What the kernel is compiled for besides levels, tile and epilogue; arguments as :func:`elastic_levels_fwd`."""
    vector, tma = 16 // xs[0].element_size(), has_tma(weight.device)
    wide, wide_y = (all(t.shape[1] % vector == 0 and t.data_ptr() % 16 == 0 for t in side) for side in (xs, ys))
    return {
        "WIDE": wide and (tma or _in_vectors(weight)),
        "WIDE_Y": wide_y,
        "V": vector,
        "TMA": tma,
        "PRECISION": "ieee" if xs[0].dtype == torch.float32 and not allow_tf32 else "tf32",
        # Triton's interpreter multiplies bf16 wrongly.
        "DOT_IN_FP32": not isinstance(_elastic_levels_fwd_kernel, triton.JITFunction),
    }


def _odd(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], positions: Sequence[int]) -> tuple[int, ...]:
    levels = zip(positions, xs, ys, strict=True)
    return tuple(2 * size + 3 for m, x, y in levels for size in (m, *x.shape[2:], *y.shape[2:]))


AOT_KINDS = (("bf16", 2, "tf32"), ("fp16", 2, "tf32"), ("fp32", 4, "tf32"), ("fp32", 4, "ieee"))


def aot_tiles(dtype: str, precision: str) -> list[tuple[str, dict, dict]]:
    """A label, constants and blocks for every tile that ``tile`` can choose, with descriptors and without."""
    itemsize = {kind[0]: kind[1] for kind in AOT_KINDS}[dtype]
    found = {}
    for positions, wide, tma in itertools.product((10**6, 64 * 132, 1), (True, False), (True, False)):
        blocks = tile(positions, 256, itemsize=itemsize, ieee=precision == "ieee", wide=wide, tma=tma)
        constants = {"WIDE": wide, "V": 16 // itemsize, "TMA": tma, "PRECISION": precision}
        label = f"{dtype} {precision} {'x'.join(map(str, blocks.values()))}"
        label += f"{'' if wide else ' narrow'}{'' if tma else ' pointers'}"
        found[label] = (label, constants, blocks)
    return list(found.values())


def aot_variants() -> list[dict]:
    """What the launcher can ask Triton to compile, for the ahead-of-time gate: every tile of every dtype and route.

    Returns:
        One dict a variant: ``name``; ``kernel``; ``signature``, ``constants``, ``aligned`` pointers and ``options`` as
        the compiler takes them; and what must be seen: ``matrix`` instructions, ``tma`` loads, ``wide`` copies and
        ``wide_y`` stores.
    """
    variants = []
    for dtype, _, precision in AOT_KINDS:
        for label, constants, blocks in aot_tiles(dtype, precision):
            largest = "128x128" in label
            for levels, wide_y in ((5, True), (1, True), (5, False)):
                # Five levels need most. The rest is seen where tiles are largest, and fp16 is bf16 but for the type.
                if largest or (dtype != "fp16" and (levels, wide_y) == (5, True)):
                    settings = constants | {"LEVELS": levels, "RELU": True, "WIDE_Y": wide_y, "DOT_IN_FP32": False}
                    name = f"{label} x{levels}{'' if wide_y else ', odd Cout'}"
                    variants.append(_variant(name, dtype, settings | blocks))
    return variants


def _variant(label: str, dtype: str, constants: dict) -> dict:
    kernel, levels = _elastic_levels_fwd_kernel, constants["LEVELS"]
    block = [1, 1, constants["BLOCK_N"], constants["BLOCK_K"]]
    images = (f"*{dtype}",) * levels
    types = {"x_ptrs": images, "y_ptrs": images, "sizes": ("i32",) * (5 * levels), "bias_ptr": "*fp32"}
    types |= {"weight": f"tensordesc<{dtype}{block}>" if constants["TMA"] else f"*{dtype}"}
    types |= dict.fromkeys(constants, "constexpr")
    return {
        "name": f"{kernel.__name__} {label}",
        "kernel": kernel,
        "signature": {name: types.get(name, "i32") for name in kernel.arg_names},
        "constants": constants,
        "aligned": ("x_ptrs", "y_ptrs") + (() if constants["TMA"] else ("weight",)),
        "options": {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES},
        "matrix": constants["PRECISION"] != "ieee",
        "tma": constants["TMA"],
        "wide": constants["WIDE"],
        "wide_y": constants["WIDE_Y"],
    }
