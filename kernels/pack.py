"""Pack and unpack of the active weights of a subnet: one launch for all parts, a program a piece.

The tables (parts, pieces, lists) are made by ``jdkd/ops/pack_table.py``, which explains merged dimensions and modes;
the formulas are in ``jdkd/reference/pack.py``. Addresses of single tensors are read from device memory, since a launch
with hundreds of pointer arguments would compile a variant for every number of them.
"""

import contextlib

import torch
import triton
import triton.language as tl

PACK, ADD, SET = (tl.constexpr(action) for action in range(3))
COPY, GATHER, TURN = (tl.constexpr(mode) for mode in range(3))
FIELDS = tl.constexpr(16)  # int64 of a part
BLOCK = {"BLOCK": 1024, "num_warps": 8}  # elements in flight; twice as many where they move in vectors
TAPS = tl.constexpr(16)  # turned at a time


@triton.jit
def _wide(value, INTERPRETED: tl.constexpr):
    """Values as float32. Triton's interpreter converts bfloat16 wrongly, zeros above all, so there bits are moved."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _rounded(value, like, INTERPRETED: tl.constexpr):
    """float32 values in the dtype of a pointer, to nearest even."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(like.dtype.element_ty)


@triton.jit
def _move(shared, packed, mask, ACTION: tl.constexpr, INTERPRETED: tl.constexpr):
    """One action on matching places of both sides."""
    if ACTION == PACK:
        value = _wide(tl.load(shared, mask=mask, other=0.0), INTERPRETED)
        tl.store(packed, _rounded(value, packed, INTERPRETED), mask=mask)
    else:
        value = _wide(tl.load(packed, mask=mask, other=0.0), INTERPRETED)
        if ACTION == ADD:
            value += _wide(tl.load(shared, mask=mask, other=0.0), INTERPRETED)
        tl.store(shared, _rounded(value, shared, INTERPRETED), mask=mask)


@triton.jit
def _move_turned(shared, packed, shared_mask, packed_mask, ACTION: tl.constexpr, INTERPRETED: tl.constexpr):
    """One action between places [columns, taps] of the shared side and [taps, columns] of the packed one."""
    if ACTION == PACK:
        value = tl.trans(_wide(tl.load(shared, mask=shared_mask, other=0.0), INTERPRETED))
        tl.store(packed, _rounded(value, packed, INTERPRETED), mask=packed_mask)
    else:
        value = tl.trans(_wide(tl.load(packed, mask=packed_mask, other=0.0), INTERPRETED))
        if ACTION == ADD:
            value += _wide(tl.load(shared, mask=shared_mask, other=0.0), INTERPRETED)
        tl.store(shared, _rounded(value, shared, INTERPRETED), mask=shared_mask)


@triton.jit
def _active(index_ptr, first, place, mask):
    """Channels of the shared tensor: a list that begins at ``first``, or, where that is negative, the leading ones."""
    channel = place.to(tl.int64)
    if first >= 0:
        channel = tl.load(index_ptr + first + channel, mask=mask, other=0)
    return channel


@triton.jit
def _tap(part, t):
    """Where a tap lies in the shared tensor."""
    width = tl.load(part + 3).to(tl.int32)
    return (t // width).to(tl.int64) * tl.load(part + 6) + (t % width).to(tl.int64) * tl.load(part + 7)


# What changes with the subnet is not compiled in: the number of parts, where their first tensors begin.
@triton.jit(do_not_specialize=["part_count"], do_not_specialize_on_alignment=["shared_ptr", "packed_ptr"])
def _pack_kernel(
    pointers_ptr,  # [n] int64: addresses of the single tensors, shared ones first
    shared_ptr,  # the flat buffer of dense gradients, or any shared tensor, for its type
    packed_ptr,  # the flat buffer of packed weights, or any packed tensor
    parts_ptr,  # [P, FIELDS] int64
    pieces_ptr,  # [pieces, 4] int32
    index_ptr,  # all lists, int64
    part_count,
    ACTION: tl.constexpr,
    ALIGNED: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One piece: rows by taps by columns of one part, about 4096 elements.

    **Grid**: (pieces,), in the order of the parts.
    **Reads / Writes**: every active element once on either side; ADD reads the shared side too.
    **Numerics**: float32, rounded once. **Deterministic**: yes, one lane owns an element.
    **Limits**: 64-bit offsets. Whole vectors move where ALIGNED, for parts whose mode is COPY; the turn is coalesced
    on both sides, element by element. No tensor may be given twice to ADD.
    """
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 4
    place, first_row, first_column = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    part = parts_ptr + place.to(tl.int64) * FIELDS
    rows = tl.minimum(tl.load(part + 12), tl.load(part) - first_row).to(tl.int32)
    across = tl.load(part + 1)  # columns of the part
    columns = tl.minimum(tl.load(part + 13), across - first_column).to(tl.int32)
    taps = (tl.load(part + 2) * tl.load(part + 3)).to(tl.int32)
    row_stride, column_stride = tl.load(part + 4), tl.load(part + 5)
    row_list, column_list, mode = tl.load(part + 9), tl.load(part + 10), tl.load(part + 11)
    if ACTION == SET:
        shared = shared_ptr + tl.load(part + 15)
    else:
        shared = tl.load(pointers_ptr + place).to(shared_ptr.dtype)
    if ACTION == PACK:
        packed = packed_ptr + tl.load(part + 14)
    else:
        first_packed = part_count if ACTION == ADD else 0
        packed = tl.load(pointers_ptr + first_packed + place).to(packed_ptr.dtype)
    if ALIGNED:
        shared, packed = tl.multiple_of(shared, 16), tl.multiple_of(packed, 16)
    offset = tl.load(part + 8)
    if mode == TURN:
        tap = tl.arange(0, TAPS)
        for first in range(0, rows * columns, BLOCK // TAPS):
            m = first + tl.arange(0, BLOCK // TAPS)
            inside = m < rows * columns
            r, c = first_row + m // columns, first_column + m % columns
            own = _active(index_ptr, row_list, r, inside) * row_stride + offset
            own += _active(index_ptr, column_list, c, inside) * column_stride
            theirs = r.to(tl.int64) * taps * across + c
            for first_tap in range(0, taps, TAPS):
                t = first_tap + tap
                left = shared + own[:, None] + _tap(part, t)[None, :]
                right = packed + theirs[None, :] + t.to(tl.int64)[:, None] * across
                left_mask = inside[:, None] & (t < taps)[None, :]
                _move_turned(left, right, left_mask, inside[None, :] & (t < taps)[:, None], ACTION, INTERPRETED)
    elif ALIGNED and mode == COPY:
        vectors = columns // V
        lane = tl.arange(0, V)[None, :]
        for first in range(0, rows * taps * vectors, 2 * BLOCK // V):
            i = first + tl.arange(0, 2 * BLOCK // V)
            inside = i < rows * taps * vectors
            run, c = i // vectors, first_column + i % vectors * V
            r, t = first_row + run // taps, run % taps
            own = _active(index_ptr, row_list, r, inside) * row_stride + _tap(part, t) + offset + c
            theirs = (r.to(tl.int64) * taps + t) * across + c
            # Steps of the shared side are whole 16-byte vectors of its own elements, of which V may hold two.
            own = tl.multiple_of(own, 128 // shared_ptr.dtype.element_ty.primitive_bitwidth)
            theirs = tl.multiple_of(theirs, V)
            _move(shared + own[:, None] + lane, packed + theirs[:, None] + lane, inside[:, None], ACTION, INTERPRETED)
    else:
        for first in range(0, rows * taps * columns, BLOCK):
            i = first + tl.arange(0, BLOCK)
            inside = i < rows * taps * columns
            run, c = i // columns, first_column + i % columns
            r, t = first_row + run // taps, run % taps
            own = _active(index_ptr, row_list, r, inside) * row_stride + _tap(part, t) + offset
            own += _active(index_ptr, column_list, c, inside) * column_stride
            _move(shared + own, packed + (r.to(tl.int64) * taps + t) * across + c, inside, ACTION, INTERPRETED)


def launch(
    op: str,
    pointers: torch.Tensor,
    shared: torch.Tensor,
    packed: torch.Tensor,
    parts: torch.Tensor,
    pieces: torch.Tensor,
    index: torch.Tensor,
    aligned: bool,
) -> None:
    """Packs all parts, or brings their gradients back.

    Args:
        op: ``"pack"``, ``"unpack_add_"`` or ``"unpack"``.
        pointers: addresses of the single tensors, int64: of the shared weights ``[P]``, of the shared gradients and
            then the packed ones ``[2 P]``, or of the packed gradients ``[P]``.
        shared: any of the shared tensors, for its dtype; of ``"unpack"`` the zeros that it fills in.
        packed: any of the packed tensors, for its dtype; of ``"pack"`` where the packed weights go. Flat buffers begin
            at multiples of 16 bytes.
        parts: ``[P, 16]`` int64.
        pieces: ``[pieces, 4]`` int32.
        index: all lists, int64.
        aligned: whether all addresses are multiples of 16 bytes.
    """
    action = {"pack": PACK, "unpack_add_": ADD, "unpack": SET}[op]
    vector = 16 // min(shared.element_size(), packed.element_size())
    interpreted = not isinstance(_pack_kernel, triton.JITFunction)
    elsewhere = shared.is_cuda and shared.device.index != torch.cuda.current_device()
    with torch.cuda.device(shared.device) if elsewhere else contextlib.nullcontext():
        _pack_kernel[(len(pieces),)](
            pointers, shared, packed, parts, pieces, index, len(parts),
            ACTION=action, ALIGNED=aligned, V=vector, INTERPRETED=interpreted, **BLOCK,
        )  # fmt: skip


def aot_variants() -> list[dict]:
    """What the launchers can ask Triton to compile, for the ahead-of-time gate; see ``kernels/pearson.py``."""
    variants = []
    pairs = [("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
    for shared, packed in pairs:
        for name, action in (("pack", PACK), ("add", ADD), ("set", SET)):
            for aligned in (True, False):
                vector = 4 if shared == packed == "fp32" else 8
                constants = {"ACTION": action.value, "ALIGNED": aligned, "V": vector, "BLOCK": BLOCK["BLOCK"]}
                constants |= {"INTERPRETED": False}
                pointers = {"pointers_ptr": "*i64", "shared_ptr": f"*{shared}", "packed_ptr": f"*{packed}"}
                pointers |= {"parts_ptr": "*i64", "pieces_ptr": "*i32", "index_ptr": "*i64"}
                variants.append({
                    "name": f"_pack_kernel {name} {shared}->{packed}{'' if aligned else ' unaligned'}",
                    "kernel": _pack_kernel,
                    "signature": pointers | {"part_count": "i32"} | dict.fromkeys(constants, "constexpr"),
                    "constants": constants,
                    "aligned": ("pointers_ptr", "parts_ptr", "pieces_ptr", "index_ptr"),
                    "options": {"num_warps": BLOCK["num_warps"]},
                    "features": 1,
                    "wide": aligned,
                })  # fmt: skip
    return variants
