"""The Pearson distillation loss in Triton: split form, one launch for all levels each way and a small finish.

The formulas (loss, coefficients ``a, b, k``, residual) are derived in ``jdkd/reference/pearson.py``.

**Chunks.** A program of the statistics reduces one *chunk*: some thousand positions of one channel (NCHW) or of a block
of channels (channels-last). All its sums are taken around the mean of its first tile, ``d = x - shift``, and corrected
at the end by ``(sum d)^2 / n``. That cancels at worst as many units as the chunk has tiles: where the first tile lies
far from the rest, as a padded corner does, it is itself part of the chunk and widens its spread. A single element as
the shift has no such bound, and plain sums have none either. The residual's ``beta`` is the first tile's too; of a
chunk whose deviations turn out to be in another ratio, as where an object stands on a background that is still in one
of the two, the plain sum of ``d_s d_t`` is taken. The finish joins chunks in float64, in a fixed order.

**Alignment.** Planes of 1050 or 273 elements start anywhere. A chunk is cut into a *body* of whole 16-byte vectors,
masked vector by vector so that loads and stores stay wide, and an *edge* of fewer than two vectors. Nothing outside
the chunk is touched. Levels that do not begin at a multiple of 16 bytes get a launch of their own, with narrow loads.

**Sizes** travel as odd numbers in a tuple, ``2 x + 3``: Triton compiles a variant for every integer that happens to be
1 or a multiple of 16, and has no way to say otherwise for the members of a tuple. Offsets are 64-bit.
"""

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton

from .pearson_chunk import MOMENTS, TABLE_ROWS, VALUES
from .pearson_finish import _pearson_finish_kernel, _pearson_sum_kernel
from .pearson_planes import _pearson_plane_grad_kernel, _pearson_plane_stats_kernel
from .pearson_rows import _pearson_row_grad_kernel, _pearson_row_stats_kernel

# Fixed for every size, so that nothing is tuned or compiled when a new image size comes along.

PLANES = {"TILE": 2048, "num_warps": 4}
ROWS = {"TILE": 32, "CHANNELS": 64, "num_warps": 8}
FINISH = {"TILE": 32, "CHANNELS": 8, "num_warps": 4}
SUM = {"TILE": 16, "num_warps": 1}
PLANE_CHUNK = 8192  # positions at most
ROW_CHUNK, ROW_CHUNKS, ROW_CHUNK_LIMIT = 256, 128, 8192  # positions at least; chunks meant at most; positions at most


class Level(NamedTuple):
    """What the launches of a level depend on.

    Args:
        shape: ``(N, C, H, W)``.
        x: dtype of the one side.
        y: dtype of the other.
        channels_last: layout of both.
        aligned: everything read begins at a multiple of 16 bytes.
    """

    shape: tuple[int, ...]
    x: torch.dtype
    y: torch.dtype
    channels_last: bool
    aligned: bool


class Launch(NamedTuple):
    """Levels that one launch takes: alike but for their shapes. A pyramid is one.

    Args:
        places: of these levels among all; the largest level first, as its programs run longest.
        channels_last: their layout.
        sizes: of the statistics and the gradient.
        finish_sizes: of the finish.
        programs: of the statistics and the gradient.
        chunks: of every level, a channel.
        cells: floats that the statistics write.
        constants: of the statistics and the gradient.
    """

    places: tuple[int, ...]
    channels_last: bool
    sizes: tuple[int, ...]
    finish_sizes: tuple[int, ...]
    programs: int
    chunks: tuple[int, ...]
    cells: int
    constants: dict[str, int]


@functools.lru_cache(maxsize=1024)
def plan(levels: tuple[Level, ...]) -> tuple[Launch, ...]:
    """Sorts levels into launches."""
    columns = [sum(level.shape[1] for level in levels[:i]) for i in range(len(levels))]
    members: dict[tuple, list[int]] = {}
    for i, (_, *kind) in enumerate(levels):
        members.setdefault(tuple(kind), []).append(i)
    return tuple(_launch(levels, columns, places) for places in members.values())


def _launch(levels: Sequence[Level], columns: Sequence[int], places: list[int]) -> Launch:
    shapes = [(n, c, h * w) for n, c, h, w in (level.shape for level in levels)]
    places = sorted(places, key=lambda i: -shapes[i][0] * shapes[i][2])
    kind = levels[places[0]]
    own = [(*shapes[i], columns[i]) for i in places]
    channels = [c for _, c, _, _ in own]
    vector = 16 // min(kind.x.itemsize, kind.y.itemsize)
    constants = {"LEVELS": len(places), "V": vector}
    if kind.channels_last:
        cuts = [(n * area, c, _row_chunk_length(n * area), column) for n, c, area, column in own]
        chunks = [triton.cdiv(m, length) for m, _, length, _ in cuts]
        blocks = [triton.cdiv(c, ROWS["CHANNELS"]) for c in channels]
        constants |= {**ROWS, "WIDE": all(level.shape[1] % vector == 0 for level in levels)}
    else:
        cuts = [(n, c, area, triton.cdiv(area, PLANE_CHUNK), column) for n, c, area, column in own]
        chunks = [n * pieces for n, _, _, pieces, _ in cuts]
        blocks = channels
        constants |= PLANES
    return Launch(
        places=tuple(places),
        channels_last=kind.channels_last,
        sizes=_odd(cuts),
        finish_sizes=_odd((i, pieces, c, columns[i]) for i, pieces, c in zip(places, chunks, channels, strict=True)),
        programs=sum(pieces * b for pieces, b in zip(chunks, blocks, strict=True)),
        chunks=tuple(chunks),
        cells=VALUES.value * sum(pieces * c for pieces, c in zip(chunks, channels, strict=True)),
        constants=constants,
    )


def _row_chunk_length(positions: int) -> int:
    length = triton.cdiv(triton.cdiv(positions, ROW_CHUNKS), ROWS["TILE"]) * ROWS["TILE"]
    return min(max(length, ROW_CHUNK), ROW_CHUNK_LIMIT)


def _odd(levels: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    sizes = tuple(size for level in levels for size in level)
    if max(sizes) > 2**30 - 2:
        raise ValueError(f"a level of {max(sizes)} positions is more than the Pearson kernels take, 2^30 - 2")
    return tuple(2 * size + 3 for size in sizes)


def _launches(*sides: Sequence[torch.Tensor]) -> tuple[Launch, ...]:
    """The plan for levels x, y and, where there are any, dout."""
    levels = []
    for x, y, *others in zip(*sides, strict=True):
        # A 1x1 map is dense in both layouts; as rows it can be read in vectors.
        channels_last = not x.is_contiguous() or x.shape[2] * x.shape[3] == 1
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (x, y, *others))
        levels.append(Level(x.shape, x.dtype, y.dtype, channels_last, aligned))
    return plan(tuple(levels))


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def pearson_fwd(
    students: list[torch.Tensor],
    teachers: list[torch.Tensor],
    weights: Sequence[float],
    eps: float,
    skip_constant: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (scalar), losses of the levels ``[L]``, coefficients ``[2, 5, sum of C]``, moments ``[6, sum of C]``.

    All float32, but for the moments, which are float64.

    Args:
        students: levels ``[N, C, H, W]``, float32, bfloat16 or float16, contiguous or channels-last.
        teachers: levels of the same shapes and layouts.
        weights: factor of each level's loss, rounded to float32.
        eps: what is added to the standard deviations.
        skip_constant: leave out channels in which student or teacher never changes.

    Raises:
        ValueError: if a level has more positions than the kernels count.
    """
    launches = _launches(students, teachers)
    channels, levels = [level.shape[1] for level in students], len(students)
    columns, blocks = sum(channels), triton.cdiv(max(channels), FINISH["CHANNELS"])
    new = students[0].new_empty
    loss, losses = new((), dtype=torch.float32), new((levels,), dtype=torch.float32)
    table = new((2, TABLE_ROWS.value, columns), dtype=torch.float32)
    moments = new((MOMENTS.value, columns), dtype=torch.float64)
    parts = new((levels, blocks), dtype=torch.float64)
    with _on_device(loss):
        for launch in launches:
            chunks = new(launch.cells, dtype=torch.float32)
            x, y = (tuple(side[i] for i in launch.places) for side in (students, teachers))
            kernel = _pearson_row_stats_kernel if launch.channels_last else _pearson_plane_stats_kernel
            kernel[(launch.programs,)](x, y, chunks, launch.sizes, **launch.constants)
            _pearson_finish_kernel[(blocks, len(x))](
                chunks, moments, table, parts, launch.finish_sizes, tuple(float(weights[i]) for i in launch.places),
                columns, eps, LEVELS=len(x), SKIP=skip_constant, **FINISH,
            )  # fmt: skip
        rows = triton.next_power_of_2(levels)
        _pearson_sum_kernel[(1,)](parts, losses, loss, blocks, LEVELS=levels, ROWS=rows, **SUM)
    return loss, losses, table, moments


def pearson_bwd(
    dloss: torch.Tensor,
    x: list[torch.Tensor],
    y: list[torch.Tensor],
    coefficients: torch.Tensor,
    dout: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """Gradients with respect to ``x``, in its dtypes and layouts, each with what else reaches ``x`` added.

    Args:
        dloss: incoming gradient, a float32 scalar, read on the device.
        x: all students or all teachers; see :func:`pearson_fwd`.
        y: the other side.
        coefficients: ``[5, sum of C]``, the entry of ``x`` in the table of the forward.
        dout: gradients to be added, of the shapes, dtypes and layouts of ``x``; or none.
    """
    coefficients = coefficients.contiguous()
    gradients = [torch.empty_like(level) for level in x]
    with _on_device(coefficients):
        for launch in _launches(x, y, *([dout] if dout else [])):
            sides = (tuple(side[i] for i in launch.places) if side else None for side in (x, y, dout, gradients))
            kernel = _pearson_row_grad_kernel if launch.channels_last else _pearson_plane_grad_kernel
            kernel[(launch.programs,)](
                *sides, dloss, coefficients, launch.sizes, coefficients.shape[1], **launch.constants
            )
    return gradients


def aot_variants() -> list[dict]:
    """What the launchers can ask Triton to compile, for the ahead-of-time gate (``tests/test_aot.py``).

    Returns:
        One dict a variant: ``name``; ``kernel``; ``signature``, a type for every parameter, tuples for tuples;
        ``constants``; ``aligned``, the parameters whose pointers are multiples of 16 bytes, as the caching allocator's
        are; ``options`` of the compiler; ``features``, the number of tensors of features read; ``wide``, whether all
        of them must move 16 bytes at a time.
    """
    variants = []
    for dtype, vector in (("fp32", 4), ("bf16", 8), ("fp16", 8)):
        for levels in (1, 5):
            variants += _feature_variants(dtype, vector, levels)
    for levels in (1, 5):
        pointers = {"chunk_ptr": "*fp32", "moments_ptr": "*fp64", "table_ptr": "*fp32", "part_ptr": "*fp64"}
        scalars = {"weights": ("fp32",) * levels, "columns_in_all": "i32", "eps": "fp64"}
        for skip in (False, True):
            job = (_pearson_finish_kernel, pointers, 4 * levels, scalars, FINISH | {"LEVELS": levels, "SKIP": skip})
            variants.append(_variant(f"x{levels}{' skip' if skip else ''}", *job))
        pointers = {"part_ptr": "*fp64", "losses_ptr": "*fp32", "loss_ptr": "*fp32"}
        constants = SUM | {"LEVELS": levels, "ROWS": triton.next_power_of_2(levels)}
        variants.append(_variant(f"x{levels}", _pearson_sum_kernel, pointers, 0, {"parts": "i32"}, constants))
    return variants


def _feature_variants(dtype: str, vector: int, levels: int) -> list[dict]:
    """The statistics and the gradient, with dout and without, in both layouts: wide, and where they cannot be."""
    features = (f"*{dtype}",) * levels
    shared = {"LEVELS": levels, "V": vector}
    stats = {"s_ptrs": features, "t_ptrs": features, "chunk_ptr": "*fp32"}
    plain = {"x_ptrs": features, "y_ptrs": features, "dout_ptrs": "constexpr", "dx_ptrs": features}
    plain |= {"dloss_ptr": "*fp32", "table_ptr": "*fp32"}
    tap = plain | {"dout_ptrs": features}
    variants = []
    for what, pointers, read in (("", stats, 2), ("", plain, 2), (" with dout", tap, 3)):
        if pointers is stats:
            kernels, scalars = (_pearson_plane_stats_kernel, _pearson_row_stats_kernel), {}
        else:
            kernels, scalars = (_pearson_plane_grad_kernel, _pearson_row_grad_kernel), {"columns": "i32"}
        for aligned in (True, False):
            label = f"{dtype} x{levels}{what}{'' if aligned else ' unaligned'}"
            job = (kernels[0], pointers, 5 * levels, scalars, PLANES | shared)
            variants.append(_variant(label, *job, features=read, aligned=aligned, wide=aligned))
            for wide in (True, False) if aligned else (True,):
                last = {f"{name}_in_all": kind for name, kind in scalars.items()}
                job = (kernels[1], pointers, 4 * levels, last, ROWS | shared | {"WIDE": wide})
                name = label if wide else f"{label}, odd C"
                variants.append(_variant(name, *job, features=read, aligned=aligned, wide=wide and aligned))
    return variants


def _variant(label, kernel, pointers, sizes, scalars, settings, *, features=0, aligned=True, wide=False) -> dict:
    constants = {name: value for name, value in settings.items() if name != "num_warps"}
    signature = (
        pointers | ({"sizes": ("i32",) * sizes} if sizes else {}) | scalars | dict.fromkeys(constants, "constexpr")
    )
    unknown = {"dloss_ptr"}  # specialised on nothing, as is the table over planes and, half the time, for an odd C
    if features and not settings.get("WIDE"):
        unknown |= {"table_ptr"}
    if not aligned:
        unknown |= {"s_ptrs", "t_ptrs", "x_ptrs", "y_ptrs", "dout_ptrs"}
    return {
        "name": f"{kernel.__name__} {label}",
        "kernel": kernel,
        "signature": signature,
        "constants": constants | {name: None for name, kind in pointers.items() if kind == "constexpr"},
        "aligned": tuple(name for name, kind in pointers.items() if name not in unknown and kind != "constexpr"),
        "options": {"num_warps": settings["num_warps"]},
        "features": features,
        "wide": wide,
    }
