"""Where the Triton kernels of the Pearson loss look in memory: past 2^31 elements, and never outside a chunk."""

from __future__ import annotations

import random

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from jdkd import _backend  # noqa: E402
from jdkd.kernels import pearson  # noqa: E402
from jdkd.kernels.pearson_finish import _finish_level  # noqa: E402
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
    level, first, last, columns, channels, column, cell = _row_chunk(sizes, program, LEVELS, CHANNELS, False, 8)
    for i, value in enumerate((level, first, last, channels, column, cell)):
        tl.store(out_ptr + i, value)
    tl.store(columns_ptr + tl.arange(0, CHANNELS), columns)


@triton.jit
def _finish_level_kernel(out_ptr, sizes, level, LEVELS: tl.constexpr):
    for i, value in enumerate(_finish_level(sizes, level, LEVELS)):
        tl.store(out_ptr + i, value)


@triton.jit
def _body_and_edge_kernel(out_ptr, edge_ptr, mask_ptr, first, last, V: tl.constexpr):
    start, end, edge, mask = _body_and_edge(tl.cast(first, tl.int64), tl.cast(last, tl.int64), V)
    tl.store(out_ptr, start)
    tl.store(out_ptr + 1, end)
    tl.store(edge_ptr + tl.arange(0, 2 * V), edge)
    tl.store(mask_ptr + tl.arange(0, 2 * V), mask.to(tl.int64))


def launch(shapes: list[tuple[int, int, int, int]], channels_last: bool) -> pearson.Launch:
    levels = [pearson.Level(shape, torch.bfloat16, torch.bfloat16, channels_last, True) for shape in shapes]
    (found,) = pearson.plan(tuple(levels))
    return found


def drawn(programs: int, draw: random.Random) -> list[int]:
    return [0, programs - 1, *(draw.randrange(programs) for _ in range(8))]


VALUES = pearson.VALUES.value  # of a chunk
HUGE = [(70, 256, 400, 672), (70, 256, 33, 31), (3, 5, 30_000, 30_011)]  # 4.8e9, 1.8e7 and 1.4e10 elements
HUGE_ROWS = [(70, 256, 400, 672), (1, 100, 9, 9), (2, 72, 20_000, 20_000)]


def test_chunks_of_planes_cover_a_pyramid_of_more_than_2_to_the_31_elements():
    plan, before, draw = launch(HUGE, channels_last=False), 0, random.Random(0)
    assert plan.places == (2, 0, 1)  # the largest first
    for position, (place, chunks) in enumerate(zip(plan.places, plan.chunks, strict=True)):
        n, c, h, w = HUGE[place]
        area, pieces = h * w, chunks // n
        length = ((area + pieces - 1) // pieces + 15) // 16 * 16
        for local in drawn(c * chunks, draw):
            plane, piece = divmod(local, pieces)
            found = torch.full((6,), -1)
            _plane_chunk_kernel[(1,)](found, plan.sizes, before + local, LEVELS=3)
            first = plane * area + piece * length
            last = plane * area + min((piece + 1) * length, area)
            image, channel = divmod(plane, c)
            cell = VALUES * (before + (image * pieces + piece) * c) + channel
            column = sum(shape[1] for shape in HUGE[:place]) + channel
            assert found.tolist() == [position, first, last, column, cell, c]
            assert 0 < last - first <= pearson.PLANE_CHUNK
        before += c * chunks
    assert plan.programs == before
    assert plan.cells == VALUES * before


def test_chunks_of_rows_cover_a_pyramid_of_more_than_2_to_the_31_elements():
    shapes = HUGE_ROWS
    plan, block_size = launch(shapes, channels_last=True), pearson.ROWS["CHANNELS"]
    assert plan.places == (2, 0, 1)
    assert not plan.constants["WIDE"]  # for the sake of the 100
    before, cells = 0, 0
    for position, (place, chunks) in enumerate(zip(plan.places, plan.chunks, strict=True)):
        n, c, h, w = shapes[place]
        blocks, length = -(-c // block_size), pearson._row_chunk_length(n * h * w)
        for local in drawn(chunks * blocks, random.Random(0)):
            chunk, block = divmod(local, blocks)
            found, columns = torch.full((6,), -1), torch.full((block_size,), -1)
            _row_chunk_kernel[(1,)](found, columns, plan.sizes, before + local, LEVELS=3, CHANNELS=block_size)
            first, last = chunk * length, min(chunk * length + length, n * h * w)
            expected = [position, first, last, c, sum(s[1] for s in shapes[:place]), cells + chunk * VALUES * c]
            assert found.tolist() == expected
            assert columns[0] == block * block_size
            assert 0 < last - first <= pearson.ROW_CHUNK_LIMIT
        before += chunks * blocks
        cells += VALUES * chunks * c
    assert plan.programs == before
    assert plan.cells == cells


@pytest.mark.parametrize(("shapes", "channels_last"), [(HUGE, False), (HUGE_ROWS, True)])
def test_the_finish_finds_the_chunks_of_a_level(shapes, channels_last):
    plan, cells = launch(shapes, channels_last), 0
    for position, (place, chunks) in enumerate(zip(plan.places, plan.chunks, strict=True)):
        c, found = shapes[place][1], torch.full((5,), -1)
        _finish_level_kernel[(1,)](found, plan.finish_sizes, position, LEVELS=3)
        assert found.tolist() == [place, chunks, c, sum(shape[1] for shape in shapes[:place]), cells]
        cells += VALUES * chunks * c
    assert plan.cells == cells


def test_only_levels_alike_share_a_launch():
    level = pearson.Level((2, 16, 8, 8), torch.bfloat16, torch.bfloat16, False, True)
    others = [{"x": torch.float16}, {"y": torch.float32}, {"channels_last": True}, {"aligned": False}]
    levels = [level, *(level._replace(**other) for other in others), level._replace(shape=(2, 16, 9, 9))]
    assert [launched.places for launched in pearson.plan(tuple(levels))] == [(5, 0), (1,), (2,), (3,), (4,)]


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
        launch([(1, 1, 2**15, 2**15)], channels_last=False)


def test_sizes_never_invite_a_variant():
    draw = random.Random(0)
    for _ in range(200):
        shapes = [(draw.randint(1, 4), 64, draw.randint(1, 64) * 16, draw.randint(1, 64)) for _ in range(3)]
        for channels_last in (False, True):
            plan = launch(shapes, channels_last)
            for size in (*plan.sizes, *plan.finish_sizes):
                assert size % 2 == 1
                assert 1 < size < 2**31
