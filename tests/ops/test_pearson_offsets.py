"""Where the Triton kernels of the Pearson loss look in memory: past 2^31 elements, and never outside a chunk."""

from __future__ import annotations

import random

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from jdkd import _backend  # noqa: E402
from jdkd.kernels import pearson  # noqa: E402
from jdkd.kernels.pearson_planes import _body_and_edge, _plane_chunk  # noqa: E402
from jdkd.kernels.pearson_rows import _row_chunk  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.skipif(not _backend.interpreting(), reason="runs in Triton's interpreter"),
]


@triton.jit
def _plane_chunk_kernel(out_ptr, sizes, program, LEVELS: tl.constexpr):
    level, first, last, column, cell, stride = _plane_chunk(sizes, program, LEVELS)
    for i, value in enumerate((level, first, last, column, cell, stride)):
        tl.store(out_ptr + i, value)


@triton.jit
def _row_chunk_kernel(out_ptr, columns_ptr, sizes, program, LEVELS: tl.constexpr, CHANNELS: tl.constexpr):
    level, first, last, columns, channels, column, cell = _row_chunk(sizes, program, LEVELS, CHANNELS, True, 8)
    for i, value in enumerate((level, first, last, channels, column, cell)):
        tl.store(out_ptr + i, value)
    tl.store(columns_ptr + tl.arange(0, CHANNELS), columns)


@triton.jit
def _body_and_edge_kernel(out_ptr, edge_ptr, mask_ptr, first, last, V: tl.constexpr):
    start, end, edge, mask = _body_and_edge(tl.cast(first, tl.int64), tl.cast(last, tl.int64), V)
    tl.store(out_ptr, start)
    tl.store(out_ptr + 1, end)
    tl.store(edge_ptr + tl.arange(0, 2 * V), edge)
    tl.store(mask_ptr + tl.arange(0, 2 * V), mask.to(tl.int64))


def group(shapes: list[tuple[int, int, int, int]], channels_last: bool) -> pearson._Group:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    levels = [torch.empty(shape, device="meta", memory_format=layout, dtype=torch.bfloat16) for shape in shapes]
    return pearson._Group(levels, levels, list(range(len(levels))), channels_last)


HUGE = [(70, 256, 400, 672), (70, 256, 33, 31), (3, 5, 30_000, 30_011)]  # 4.8e9, 1.8e7 and 1.4e10 elements


def test_chunks_of_planes_cover_a_pyramid_of_more_than_2_to_the_31_elements():
    plan = group(HUGE, channels_last=False)
    before = [0]
    for (_, c, *_), chunks in zip(HUGE, plan.chunks, strict=True):
        before.append(before[-1] + c * chunks)
    assert plan.grid == (before[-1],)
    draw = random.Random(0)
    for level, (n, c, h, w) in enumerate(HUGE):
        area, pieces = h * w, plan.chunks[level] // n
        length = ((area + pieces - 1) // pieces + 15) // 16 * 16
        for local in (0, before[level + 1] - before[level] - 1, *(draw.randrange(n * c * pieces) for _ in range(8))):
            plane, piece = divmod(local, pieces)
            found = torch.full((6,), -1)
            _plane_chunk_kernel[(1,)](found, plan.sizes, before[level] + local, LEVELS=3)
            first = plane * area + piece * length
            last = plane * area + min((piece + 1) * length, area)
            image, channel = divmod(plane, c)
            cell = before[level] * 9 + (image * pieces + piece) * 9 * c + channel
            column = sum(shape[1] for shape in HUGE[:level]) + channel
            assert found.tolist() == [level, first, last, column, cell, c]
            assert 0 < last - first <= pearson.PLANE_CHUNK


def test_chunks_of_rows_cover_a_pyramid_of_more_than_2_to_the_31_elements():
    shapes = [(70, 256, 400, 672), (1, 100, 9, 9), (2, 72, 20_000, 20_000)]
    plan = group(shapes, channels_last=True)
    blocks = [-(-c // pearson.ROWS["CHANNELS"]) for _, c, _, _ in shapes]
    before, cells = 0, 0
    for level, (n, c, h, w) in enumerate(shapes):
        length = pearson._row_chunk_length(n * h * w)
        programs = plan.chunks[level] * blocks[level]
        for local in (0, programs // 2, programs - 1):
            chunk, block = divmod(local, blocks[level])
            found, columns = torch.full((6,), -1), torch.full((pearson.ROWS["CHANNELS"],), -1)
            _row_chunk_kernel[(1,)](
                found, columns, plan.sizes, before + local, LEVELS=3, CHANNELS=pearson.ROWS["CHANNELS"]
            )
            first, last = chunk * length, min(chunk * length + length, n * h * w)
            kept = c // 8 * 8  # this kernel says that C is a multiple of 8
            expected = [level, first, last, kept, sum(s[1] for s in shapes[:level]), cells + chunk * 9 * kept]
            assert found.tolist() == expected
            assert columns[0] == block * pearson.ROWS["CHANNELS"]
            assert 0 < last - first <= pearson.ROW_CHUNK_LIMIT
        before += programs
        cells += 9 * plan.chunks[level] * c
    assert plan.grid == (before,)


@pytest.mark.parametrize("vector", [4, 8])
def test_body_and_edge_cover_a_chunk_once(vector):
    for first in (0, 1, 5, 8, 2**33 + 3):
        for length in range(1, 3 * vector + 2):
            out, edge, mask = (torch.full((n,), -1) for n in (2, 2 * vector, 2 * vector))
            _body_and_edge_kernel[(1,)](out, edge, mask, first, first + length, V=vector)
            start, end = out.tolist()
            covered = [*range(start, end), *edge[mask.bool()].tolist()]
            assert sorted(covered) == list(range(first, first + length))
            assert start % vector == 0 and (end - start) % vector == 0


def test_a_plane_that_the_size_encoding_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"1073741824 positions"):
        group([(1, 1, 2**15, 2**15)], channels_last=False)


def test_sizes_never_invite_a_variant():
    draw = random.Random(0)
    for _ in range(200):
        shapes = [(draw.randint(1, 4), 64, draw.randint(1, 64) * 16, draw.randint(1, 64)) for _ in range(3)]
        for channels_last in (False, True):
            for size in group(shapes, channels_last).sizes:
                assert size % 2 == 1 and 1 < size < 2**31
