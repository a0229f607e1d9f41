"""The Pearson distillation loss in Triton: split form, one launch for all levels each way and a small finish.

The formulas (loss, coefficients ``a, b, k``, residual) are derived in ``jdkd/reference/pearson.py``.

**Chunks.** A program of the statistics reduces one *chunk*: some thousand positions of one channel (NCHW) or of a block
of channels (channels-last). All its sums are taken around the mean of its first tile, ``d = x - shift``, and corrected
at the end by ``(sum d)^2 / n``. That cancels at worst as many units as the chunk has tiles: where the first tile lies
far from the rest, as a padded corner does, it is itself part of the chunk and widens its spread. A single element as
the shift has no such bound, and plain sums have none either. The finish joins chunks in float64, in a fixed order.

**Alignment.** Planes of 1050 or 273 elements start anywhere. A chunk is cut into a *body* of whole 16-byte vectors,
masked vector by vector so that loads and stores stay wide, and an *edge* of fewer than two vectors. Nothing outside
the chunk is touched.

**Sizes** travel as odd numbers in a tuple, ``2 x + 1``: Triton compiles a variant for every integer that happens to be
1 or a multiple of 16, and has no way to say otherwise for the members of a tuple. Offsets are 64-bit.
"""

import contextlib
from collections.abc import Iterable

import torch
import triton

from .pearson_chunk import TABLE_ROWS, VALUES
from .pearson_finish import _pearson_finish_kernel, _pearson_sum_kernel
from .pearson_planes import _pearson_plane_grad_kernel, _pearson_plane_stats_kernel
from .pearson_rows import _pearson_row_grad_kernel, _pearson_row_stats_kernel

# Fixed for every size, so that nothing is tuned or compiled when a new image size comes along.

PLANES = {"TILE": 2048, "num_warps": 4}
ROWS = {"TILE": 32, "CHANNELS": 64, "num_warps": 8}
FINISH = {"TILE": 8, "CHANNELS": 32, "num_warps": 4}
SUM = {"TILE": 64, "num_warps": 1}
PLANE_CHUNK = 8192  # positions at most
ROW_CHUNK, ROW_CHUNKS, ROW_CHUNK_LIMIT = 256, 128, 8192  # positions at least; chunks meant at most; positions at most


class _Group:
    """Levels that one launch takes: of the same dtypes and layout. A pyramid is one group.

    Args:
        x: levels ``[N, C, H, W]``.
        y: levels of the same shapes and layouts.
        indices: the places of these levels among all.
        channels_last: their layout.
    """

    def __init__(self, x: list[torch.Tensor], y: list[torch.Tensor], indices: list[int], channels_last: bool) -> None:
        self.x, self.y, self.indices = [x[i] for i in indices], [y[i] for i in indices], indices
        self.channels_last = channels_last
        self.channels = [level.shape[1] for level in self.x]
        self.columns = sum(self.channels)
        shapes = [(level.shape[0], level.shape[1], level.shape[2] * level.shape[3]) for level in self.x]
        vector = 16 // min(self.x[0].element_size(), self.y[0].element_size())
        self.constants = {"LEVELS": len(indices), "V": vector}
        if channels_last:
            cuts = [(n * area, c, _row_chunk_length(n * area)) for n, c, area in shapes]
            self.chunks = [triton.cdiv(m, length) for m, _, length in cuts]
            blocks = [triton.cdiv(c, ROWS["CHANNELS"]) for c in self.channels]
            self.constants |= {**ROWS, "WIDE": all(c % vector == 0 for c in self.channels)}
        else:
            cuts = [(n, c, area, triton.cdiv(area, PLANE_CHUNK)) for n, c, area in shapes]
            self.chunks = [n * pieces for n, _, _, pieces in cuts]
            blocks = self.channels
            self.constants |= PLANES
        self.sizes = _odd(cuts)
        self.grid = (sum(chunks * b for chunks, b in zip(self.chunks, blocks, strict=True)),)
        self.finish_grid = (sum(triton.cdiv(c, FINISH["CHANNELS"]) for c in self.channels),)

    def statistics(self, parts: torch.Tensor, loss_weight: float) -> torch.Tensor:
        """Writes the loss of these levels in ``parts`` (float64); returns their table ``[2, 5, columns]``."""
        cells = sum(chunks * c for chunks, c in zip(self.chunks, self.channels, strict=True))
        workspace = parts.new_empty(VALUES.value * cells, dtype=torch.float32)
        table = parts.new_empty((2, TABLE_ROWS.value, self.columns), dtype=torch.float32)
        kernel = _pearson_row_stats_kernel if self.channels_last else _pearson_plane_stats_kernel
        kernel[self.grid](tuple(self.x), tuple(self.y), workspace, self.sizes, **self.constants)
        _pearson_finish_kernel[self.finish_grid](
            workspace, table, parts, _odd(zip(self.chunks, self.channels, strict=True)), self.columns,
            float(loss_weight), LEVELS=len(self.indices), **FINISH,
        )  # fmt: skip
        return table

    def gradient(self, dloss: torch.Tensor, table: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of these levels; ``table`` is ``[5, columns]``."""
        dx = [torch.empty_like(level) for level in self.x]
        kernel = _pearson_row_grad_kernel if self.channels_last else _pearson_plane_grad_kernel
        kernel[self.grid](
            tuple(self.x), tuple(self.y), tuple(dx), dloss, table, self.sizes, self.columns, **self.constants
        )
        return dx


def _row_chunk_length(positions: int) -> int:
    length = triton.cdiv(triton.cdiv(positions, ROW_CHUNKS), ROWS["TILE"]) * ROWS["TILE"]
    return min(max(length, ROW_CHUNK), ROW_CHUNK_LIMIT)


def _odd(levels: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    sizes = tuple(size for level in levels for size in level)
    if max(sizes) >= 2**30:
        raise ValueError(f"a level of {max(sizes)} positions is more than the Pearson kernels take, 2^30 - 1")
    return tuple(2 * size + 1 for size in sizes)


def _groups(x: list[torch.Tensor], y: list[torch.Tensor]) -> list[_Group]:
    members: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for i, (left, right) in enumerate(zip(x, y, strict=True)):
        # A 1x1 map is dense in both layouts; as rows it can be read in vectors.
        channels_last = not left.is_contiguous() or left.shape[2] * left.shape[3] == 1
        members.setdefault((left.dtype, right.dtype, channels_last), []).append(i)
    return [_Group(x, y, indices, key[2]) for key, indices in members.items()]


def _in_order(groups: list[_Group], pieces: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """What belongs to each level, in the order of the levels."""
    pairs = [pair for group, own in zip(groups, pieces, strict=True) for pair in zip(group.indices, own, strict=True)]
    return [piece for _, piece in sorted(pairs, key=lambda pair: pair[0])]


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def pearson_fwd(
    students: list[torch.Tensor], teachers: list[torch.Tensor], loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (scalar) and coefficients ``[2, 5, sum of C]``, both float32.

    Args:
        students: levels ``[N, C, H, W]``, float32, bfloat16 or float16, contiguous or channels-last.
        teachers: levels of the same shapes and layouts.
        loss_weight: factor of the loss.
    """
    groups = _groups(students, teachers)
    blocks = [group.finish_grid[0] for group in groups]
    parts = students[0].new_empty(sum(blocks), dtype=torch.float64)
    loss = students[0].new_empty((), dtype=torch.float32)
    with _on_device(loss):
        tables = [group.statistics(own, loss_weight) for group, own in zip(groups, parts.split(blocks), strict=True)]
        _pearson_sum_kernel[(1,)](parts, loss, parts.numel(), **SUM)
    if len(groups) == 1:
        return loss, tables[0]
    columns = [table.split(group.channels, dim=2) for group, table in zip(groups, tables, strict=True)]
    return loss, torch.cat(_in_order(groups, columns), dim=2)


def pearson_bwd(
    dloss: torch.Tensor, x: list[torch.Tensor], y: list[torch.Tensor], coefficients: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients with respect to ``x``, in its dtypes and layouts.

    Args:
        dloss: incoming gradient, a float32 scalar, read on the device.
        x: all students or all teachers; see :func:`pearson_fwd`.
        y: the other side.
        coefficients: ``[5, sum of C]``, the entry of ``x`` in the table of the forward.
    """
    groups = _groups(x, y)
    columns = coefficients.split([level.shape[1] for level in x], dim=1)
    with _on_device(coefficients):
        gradients = [
            group.gradient(
                dloss, coefficients if len(groups) == 1 else torch.cat([columns[i] for i in group.indices], dim=1)
            )
            for group in groups
        ]
    return _in_order(groups, gradients)


def aot_variants() -> list[dict]:
    """What the launchers can ask Triton to compile, for the ahead-of-time gate (``tests/test_aot.py``).

    Returns:
        One dict a variant: ``name``; ``kernel``; ``signature``, a type for every parameter, tuples for tuples;
        ``constants``; ``aligned``, the parameters whose pointers are multiples of 16 bytes, as the caching allocator's
        are; ``options`` of the compiler; ``wide``, whether every load and store of features must move 16 bytes.
    """
    variants = []
    for dtype, vector, levels in (("fp32", 4, 5), ("bf16", 8, 5), ("fp16", 8, 5), ("bf16", 8, 1)):
        features = (f"*{dtype}",) * levels
        stats = {"s_ptrs": features, "t_ptrs": features, "chunk_ptr": "*fp32"}
        grad = {"x_ptrs": features, "y_ptrs": features, "dx_ptrs": features, "dloss_ptr": "*fp32", "table_ptr": "*fp32"}
        shared = {"LEVELS": levels, "V": vector}
        jobs = [
            (_pearson_plane_stats_kernel, stats, 4, {}, PLANES | shared, True),
            (_pearson_plane_grad_kernel, grad, 4, {"columns": "i32"}, PLANES | shared, True),
        ]
        for wide in (True, False):
            constants = ROWS | shared | {"WIDE": wide}
            jobs.append((_pearson_row_stats_kernel, stats, 3, {}, constants, wide))
            jobs.append((_pearson_row_grad_kernel, grad, 3, {"columns_in_all": "i32"}, constants, wide))
        variants += [_variant(f"{dtype} x{levels}", *job, levels=levels) for job in jobs]
    for levels in (1, 5):
        finish = {"chunk_ptr": "*fp32", "table_ptr": "*fp32", "part_ptr": "*fp64"}
        scalars = {"columns_in_all": "i32", "loss_weight": "fp32"}
        job = (_pearson_finish_kernel, finish, 2, scalars, FINISH | {"LEVELS": levels}, False)
        variants.append(_variant(f"x{levels}", *job, levels=levels))
    total = {"part_ptr": "*fp64", "loss_ptr": "*fp32"}
    return [*variants, _variant("", _pearson_sum_kernel, total, 0, {"parts": "i32"}, SUM, False, levels=0)]


def _variant(label, kernel, pointers, sizes, scalars, settings, wide, *, levels) -> dict:
    constants = {name: value for name, value in settings.items() if name != "num_warps"}
    signature = pointers | ({"sizes": ("i32",) * (sizes * levels)} if sizes else {}) | scalars
    return {
        "name": f"{kernel.__name__} {label}{'' if wide or 'WIDE' not in constants else ' narrow'}".strip(),
        "kernel": kernel,
        "signature": signature | dict.fromkeys(constants, "constexpr"),
        "constants": constants,
        "aligned": tuple(pointers),
        "options": {"num_warps": settings["num_warps"]},
        "wide": wide,
    }
