"""Elastic 1x1 convolution as a GEMM: slim activations times the leading part of a shared weight, read in place.

With x channels-last, a row-major matrix of M = N OH OW output positions (every ``stride``-th of x both ways),

    y[m, o] = sum over c of x[row(m), c] W[o, c],        o < Cout of Cout_max, c < Cin of Cin_max

and, in the same pass, either ``act(scale[o] y + shift[o])`` and a residual, or mean and variance of y per channel.
On sm_90 and later the weight comes through a tensor descriptor of shape [Cout, Cin] whose row stride is that of the
shared weight: what lies outside reads as zero and is never fetched. Elsewhere it comes through pointers. The gradients
are in ``elastic_pointwise_grad.py``.

Widths are ordinary arguments. What is compiled depends on the dtype, the epilogue, the size of the whole layer (one of
two tiles) and on one property of the widths: whether rows are whole 16-byte vectors (``WIDE``).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Never eight: in this version range convolutions with eight warps or more were seen miscompiled.
NUM_WARPS = 4
NUM_STAGES = 3
MERGED = {"ENTRIES": 256, "CHANNELS": 32, "num_warps": 8}
ACTIVATIONS = ("none", "relu", "relu_then_add")  # relu comes last; relu_then_add before the residual


@triton.jit
def _image_rows(m, height, width, out_height, out_width, stride, STRIDED: tl.constexpr):
    """Rows of the matrix [N H W, C] under output positions m, int64."""
    row = m.to(tl.int64)
    if STRIDED:
        n = m // (out_height * out_width)
        p = m // out_width % out_height
        q = m % out_width
        row = (n.to(tl.int64) * height + p * stride) * width + q * stride
    return row


@triton.jit
def _whole_vectors(channels, V: tl.constexpr):
    """Says to the compiler that ``channels`` is a multiple of V, which changes nothing where it is."""
    return channels // V * V


@triton.jit
def _weight_tile(
    weight, row, column, rows, columns, weight_row, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One tile [ROWS, COLUMNS] of the active weight; zero outside of it."""
    if TMA:
        tile = weight.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        tile = tl.load(
            weight + r.to(tl.int64)[:, None] * weight_row + c[None, :],
            mask=(r < rows)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
    return tile


@triton.jit(do_not_specialize=[
    "positions", "in_channels", "out_channels", "weight_row", "height", "width", "out_height", "out_width", "stride",
])  # fmt: skip
def _elastic_pointwise_fwd_kernel(
    x_ptr,  # [N, H, W, Cin]
    weight,  # [Cout, Cin] of [Cout_max, Cin_max], a descriptor or a pointer
    scale_ptr,  # [Cout] fp32
    shift_ptr,  # [Cout] fp32
    residual_ptr,  # [N, OH, OW, Cout]
    y_ptr,  # [N, OH, OW, Cout]
    part_ptr,  # [cdiv(M, BLOCK_M), 2, Cout] fp32
    positions,  # M = N * OH * OW
    in_channels, out_channels, weight_row, height, width, out_height, out_width, stride,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr,
    STRIDED: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, DOT_IN_FP32: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y: BLOCK_M positions of BLOCK_N active output channels.

    **Grid**: (cdiv(M, BLOCK_M) * cdiv(Cout, BLOCK_N),), the channel tiles of one row of positions side by side, so
    that they find x in the L2.
    **Reads / Writes**: x cdiv(Cout, BLOCK_N) times at most, the active weight once per row of tiles, the residual
    once; writes y once, and with STATS two fp32 a channel and row of tiles.
    **Numerics**: products in the dtype of x (fp32 as TF32 where PRECISION says so), sums and epilogue in fp32, rounded
    once. STATS are of y before it is rounded: the mean of the tile, and the squares of what is left around it.
    **Deterministic**: yes, one program sums one tile in a fixed order.
    **Limits**: M < 2^30; x, y and the residual dense channels-last.
    """
    if WIDE:
        in_channels = _whole_vectors(in_channels, V)
        out_channels = _whole_vectors(out_channels, V)
        weight_row = _whole_vectors(weight_row, V)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_y = m < positions
    row = _image_rows(m, height, width, out_height, out_width, stride, STRIDED)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + row[:, None] * in_channels

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_channels, BLOCK_K):
        c = start + k
        a = tl.load(x_row + c[None, :], mask=in_y[:, None] & (c < in_channels)[None, :], other=0.0)
        b = _weight_tile(weight, first_n, start, out_channels, in_channels, weight_row, TMA, BLOCK_N, BLOCK_K)
        if DOT_IN_FP32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision=PRECISION)

    o = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    is_out = o < out_channels
    if STATS:
        seen = tl.minimum(positions - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.sum(total, 0) / seen  # rows outside are zero
        rest = tl.where(in_y[:, None], total - mean[None, :], 0.0)
        part = part_ptr + tile_m.to(tl.int64) * 2 * out_channels + o
        tl.store(part, mean, mask=is_out)
        tl.store(part + out_channels, tl.sum(rest * rest, 0), mask=is_out)
    if AFFINE:
        scale = tl.load(scale_ptr + o, mask=is_out, other=0.0)
        total = total * scale[None, :] + tl.load(shift_ptr + o, mask=is_out, other=0.0)[None, :]
    if ACTIVATION == 2:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = m.to(tl.int64)[:, None] * out_channels + o[None, :]
    inside = in_y[:, None] & is_out[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["entries", "span", "positions", "channels", "factor"])
def _elastic_pointwise_merge_kernel(
    part_ptr,  # [entries, 2, C] fp32: mean, sum of squared deviations
    merged_ptr,  # [cdiv(entries, ENTRIES), 2, C] fp32
    entries, span, positions, channels, factor,
    ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Joins the moments of ENTRIES neighbouring entries, each of ``span`` positions (the last of what is left).

    **Grid**: (cdiv(entries, ENTRIES), cdiv(C, CHANNELS)).
    **Reads / Writes**: two fp32 an entry and channel; writes as many for every ENTRIES of them.
    **Numerics**: fp32; the mean first, then the deviations around it, on chip (Chan, Golub, LeVeque 1983). The sum
    of squares is written times ``factor``, which makes it a variance at the last step.
    **Deterministic**: yes. **Limits**: none.
    """
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)  # [ENTRIES]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    inside = (entry < entries)[:, None] & (channel < channels)[None, :]
    left = tl.maximum(positions - entry.to(tl.int64) * span, 0)
    n = tl.minimum(left, span).to(tl.float32)[:, None]
    at = part_ptr + entry.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
    mean = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + channels, mask=inside, other=0.0)
    joint = tl.sum(n * mean, 0) / tl.sum(n, 0)  # [CHANNELS]
    apart = mean - joint[None, :]
    squares = tl.sum(squares + n * apart * apart, 0)
    merged = merged_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(merged, joint, mask=channel < channels)
    tl.store(merged + channels, squares * factor, mask=channel < channels)


def tile(positions: int, channels: int, *, itemsize: int, ieee: bool, wide: bool) -> dict[str, int]:
    """Chooses a tile from a short fixed list, by the whole layer, so that its widths share what is compiled.

    Args:
        positions: N * OH * OW.
        channels: columns of the result when all channels of the supernet are active.
        itemsize: bytes of an element of x.
        ieee: whether products are exact fp32, which the tensor cores do not do.
        wide: whether rows are whole 16-byte vectors.

    Returns:
        ``BLOCK_M``, ``BLOCK_N`` and ``BLOCK_K``, none of which spills registers on sm_90.
    """
    if ieee:
        return {"BLOCK_M": 64 if wide else 32, "BLOCK_N": 32, "BLOCK_K": 16}
    # Twice the multiprocessors of an H100, so that half the channels fill it too.
    large = wide and triton.cdiv(positions, 64) * triton.cdiv(channels, 128) >= 264
    return {"BLOCK_M": 64, "BLOCK_N": 128 if large else 64, "BLOCK_K": 128 // itemsize if wide else 32}


def has_tma(device: torch.device) -> bool:
    """Whether weights come through tensor descriptors there; Triton's interpreter plays them on a CPU."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] >= 9


def readable_in_place(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can read a weight where it lies.

    Args:
        weight: ``[Cout_max, Cin_max]``.
        dtype: of the activations.

    Returns:
        True if it has their dtype and dense rows and, where a descriptor reads it, base and rows at multiples of 16
        bytes.
    """
    if weight.dtype != dtype or weight.stride(1) != 1:
        return False
    return not has_tma(weight.device) or _in_vectors(weight)


def _in_vectors(weight: torch.Tensor) -> bool:
    return weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes a tensor's GPU the current one, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def settings(
    dense: tuple[torch.Tensor, ...], weight: torch.Tensor | None, channels: tuple[int, int], allow_tf32: bool
) -> dict:
    """What the kernels are compiled for besides tile and epilogue.

    Args:
        dense: channels-last activations, the first of the dtype that counts.
        weight: ``[Cout_max, Cin_max]``, if one is read.
        channels: active input and output channels.
        allow_tf32: whether fp32 products may be rounded to TF32.
    """
    vector = 16 // dense[0].element_size()
    wide = all(count % vector == 0 for count in channels) and all(t.data_ptr() % 16 == 0 for t in dense)
    tma = weight is not None and has_tma(weight.device)
    return {
        "WIDE": wide and (tma or weight is None or _in_vectors(weight)),
        "V": vector,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        # Triton's interpreter multiplies bf16 wrongly.
        "DOT_IN_FP32": not isinstance(_elastic_pointwise_fwd_kernel, triton.JITFunction),
    } | ({} if weight is None else {"TMA": tma})


def weight_operand(weight: torch.Tensor, shape: tuple[int, int], block: tuple[int, int], tma: bool):
    """The active part of a weight as the kernels take it: a descriptor made on the host, or the tensor itself.

    Args:
        weight: ``[Cout_max, Cin_max]``, see :func:`readable_in_place`.
        shape: active output and input channels.
        block: the tile that one load fetches.
        tma: which of the two.
    """
    if not tma:
        return weight
    return TensorDescriptor(weight, list(shape), list(weight.stride()), list(block))


def elastic_pointwise_fwd(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, *, stride: int = 1, scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None, residual: torch.Tensor | None = None, activation: str = "none",
    stats: bool = False, whole: int = 0, allow_tf32: bool = True,
) -> torch.Tensor | None:  # fmt: skip
    """Launches the forward into ``y``.

    Args:
        x: ``[N, Cin, H, W]``, fp32, bf16 or fp16, dense channels-last.
        weight: ``[Cout_max, Cin_max]`` of the same dtype, see :func:`readable_in_place`; or a packed copy of its
            active part. At least ``[Cout, Cin]``.
        y: ``[N, Cout, OH, OW]``, dense channels-last, of the dtype of ``x``; overwritten.
        stride: 1 or 2, in pixels, both ways.
        scale: fp32 ``[Cout]``, with ``shift``; or None.
        shift: fp32 ``[Cout]``, or None.
        residual: laid out as ``y``, or None.
        activation: one of :data:`ACTIVATIONS`.
        stats: compute mean and variance per channel of what was summed, before the epilogue.
        whole: output channels of the supernet, Cout_max; 0 means those of ``weight``.
        allow_tf32: whether fp32 products may be rounded to TF32.

    Returns:
        Mean and biased variance, ``[2, Cout]`` fp32, or None.
    """
    out_channels, in_channels = y.shape[1], x.shape[1]
    positions = y.numel() // out_channels
    dense = (x, y) if residual is None else (x, y, residual)
    options = settings(dense, weight, (in_channels, out_channels), allow_tf32)
    blocks = tile(
        positions, whole or weight.shape[0], itemsize=x.element_size(),
        ieee=x.dtype == torch.float32 and not allow_tf32, wide=options["WIDE"],
    )  # fmt: skip
    tiles_m = triton.cdiv(positions, blocks["BLOCK_M"])
    part = x.new_empty((tiles_m, 2, out_channels), dtype=torch.float32) if stats else None
    block = (blocks["BLOCK_N"], blocks["BLOCK_K"])
    with on_device(x):
        _elastic_pointwise_fwd_kernel[(tiles_m * triton.cdiv(out_channels, blocks["BLOCK_N"]),)](
            x, weight_operand(weight, (out_channels, in_channels), block, options["TMA"]), scale, shift, residual, y,
            part, positions, in_channels, out_channels, weight.stride(0), *x.shape[2:], *y.shape[2:], stride,
            AFFINE=scale is not None, RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS.index(activation),
            STATS=stats, STRIDED=stride > 1, **options, **blocks, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        return _merged(part, positions, blocks["BLOCK_M"]) if stats else None


def _merged(part: torch.Tensor, positions: int, span: int) -> torch.Tensor:
    """Mean and variance ``[2, C]`` from the moments ``[entries, 2, C]`` of every ``span`` positions."""
    channels = part.shape[2]
    while True:
        entries = part.shape[0]
        groups = triton.cdiv(entries, MERGED["ENTRIES"])
        merged = part.new_empty((groups, 2, channels))
        _elastic_pointwise_merge_kernel[(groups, triton.cdiv(channels, MERGED["CHANNELS"]))](
            part, merged, entries, span, positions, channels, 1.0 / positions if groups == 1 else 1.0, **MERGED
        )
        if groups == 1:
            return merged[0]
        part, span = merged, span * MERGED["ENTRIES"]


AOT_KINDS = (("bf16", 2, "tf32"), ("fp16", 2, "tf32"), ("fp32", 4, "tf32"), ("fp32", 4, "ieee"))
_AOT_EPILOGUES = {  # affine, residual, activation, statistics, strided
    "plain": (False, False, 0, False, False),
    "bottleneck, strided": (True, True, 1, False, True),
    "relu then add": (True, True, 2, False, False),
    "statistics": (False, False, 0, True, False),
}


def aot_variants() -> list[dict]:
    """What the forward can be compiled for, for the ahead-of-time gate: every tile of every dtype and both routes.

    Returns:
        One dict a variant: ``name``; ``kernel``; ``signature``, ``constants``, ``aligned`` pointers and ``options`` as
        the compiler takes them; and what must be seen: ``matrix`` instructions, ``tma`` loads, ``wide`` stores.
    """
    variants = []
    for dtype, _, precision in AOT_KINDS:
        for label, constants, blocks in aot_tiles(dtype, precision):
            block = [blocks["BLOCK_N"], blocks["BLOCK_K"]]
            for epilogue, flags in _AOT_EPILOGUES.items():
                if epilogue != "bottleneck, strided" and (dtype == "fp16" or not constants["TMA"]):
                    continue
                names = ("AFFINE", "RESIDUAL", "ACTIVATION", "STATS", "STRIDED")
                settings = dict(zip(names, flags, strict=True)) | constants
                affine, residual, _, stats, _ = flags
                pointers = {"x_ptr": f"*{dtype}", "weight": aot_weight(dtype, block, constants["TMA"])}
                pointers |= dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32" if affine else "constexpr")
                pointers |= {"residual_ptr": f"*{dtype}" if residual else "constexpr", "y_ptr": f"*{dtype}"}
                pointers |= {"part_ptr": "*fp32" if stats else "constexpr"}
                job = (_elastic_pointwise_fwd_kernel, pointers, settings | blocks)
                variants.append(aot_variant(f"{label}, {epilogue}", *job))
    pointers = {"part_ptr": "*fp32", "merged_ptr": "*fp32", "factor": "fp32"}
    return [*variants, aot_variant("fp32", _elastic_pointwise_merge_kernel, pointers, MERGED)]


def aot_tiles(dtype: str, precision: str) -> list[tuple[str, dict, dict]]:
    """A label, constants and blocks for every tile that ``tile`` can choose, with descriptors and without."""
    itemsize = {kind[0]: kind[1] for kind in AOT_KINDS}[dtype]
    found = []
    for positions, wide in ((10**6, True), (1, True), (10**6, False)):
        blocks = tile(positions, 256, itemsize=itemsize, ieee=precision == "ieee", wide=wide)
        for tma in (True, False):
            constants = {"WIDE": wide, "V": 16 // itemsize, "TMA": tma}
            constants |= {"PRECISION": precision, "DOT_IN_FP32": False}
            label = f"{dtype} {precision} {'x'.join(map(str, blocks.values()))}"
            label += f"{'' if wide else ' narrow'}{'' if tma else ' pointers'}"
            if label not in [other for other, _, _ in found]:
                found.append((label, constants, blocks))
    return found


def aot_weight(dtype: str, block: list[int], tma: bool) -> str:
    """Type of the weight in a signature."""
    return f"tensordesc<{dtype}{block}>" if tma else f"*{dtype}"


def aot_variant(label: str, kernel, pointers: dict[str, str], settings: dict) -> dict:
    """One entry of ``aot_variants``; parameters that are named nowhere are int32."""
    given = {name: value for name, value in settings.items() if name != "num_warps"}
    types = pointers | dict.fromkeys(given, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    absent = {name: None for name, kind in pointers.items() if kind == "constexpr"}
    multiplies = "PRECISION" in given
    return {
        "name": f"{kernel.__name__} {label}",
        "kernel": kernel,
        "signature": signature,
        "constants": given | absent,
        "aligned": tuple(name for name, kind in pointers.items() if kind.startswith("*")),
        "options": {"num_warps": settings.get("num_warps", NUM_WARPS), "num_stages": NUM_STAGES},
        "matrix": multiplies and given["PRECISION"] != "ieee",
        "tma": given.get("TMA", False),
        "wide": given.get("WIDE", False),
    }
