"""The Triton kernels of the Pearson loss by themselves: what they return, touch in memory, and make Triton compile."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from jdkd import _backend
from jdkd.kernels import pearson, pearson_planes
from jdkd.reference import pearson as reference
from tests.compilations import Compilations

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.skipif(not _backend.interpreting(), reason="runs in Triton's interpreter"),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
KERNELS = [name for name in vars(pearson) if name.startswith("_pearson_") and name.endswith("_kernel")]


def placed(shape: tuple[int, ...], layout: str, dtype: torch.dtype, offset: int, seed: int) -> Tensor:
    """A level that begins ``offset`` elements after a multiple of 16 bytes, with NaN before and behind it."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values = values.contiguous(memory_format=LAYOUTS[layout])
    around = torch.full((values.numel() + 64,), float("nan"), dtype=dtype)
    assert around.data_ptr() % 16 == 0
    return around.as_strided(shape, values.stride(), 16 + offset).copy_(values)


def addresses(*tensors: Tensor) -> np.ndarray:
    """Of every element of dense tensors, in order."""
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.element_size()) for t in tensors]
    return np.sort(np.concatenate([np.arange(*end, dtype=np.uint64) for end in ends]))


class Traffic:
    """The addresses that kernels load and store, lane by lane."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loads: list[np.ndarray] = []
        self._stores: list[np.ndarray] = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def noted_load(builder, pointers, mask, *rest):
            self._loads.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)])
            return load(builder, pointers, mask, *rest)

        def noted_store(builder, pointers, value, mask, *rest):
            self._stores.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)])
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)

    def taken(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted loads and stores since the last call."""
        found = tuple(np.sort(np.concatenate(noted)) for noted in (self._loads, self._stores))
        self._loads.clear()
        self._stores.clear()
        return found


OFFSETS = [(0, 0, 0), (1, 1, 1), (8, 8, 8), (0, 3, 1)]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_read_once_and_nothing_else_is_touched(monkeypatch, layout, offsets):
    dtype = (torch.float32, torch.bfloat16)[(OFFSETS.index(offsets) + (layout == "nhwc")) % 2]  # these take turns
    large = (1, 2, 95, 91) if layout == "nchw" else (1, 66, 20, 31)  # several tiles, chunks, and blocks of channels
    shapes = [(2, 3, 9, 7), large, (2, 5, 1, 1)]
    students, teachers, dout = (
        [placed(shape, layout, dtype, offset, seed=10 * side + i) for i, shape in enumerate(shapes)]
        for side, offset in enumerate(offsets)
    )
    traffic, weights = Traffic(monkeypatch), [1.0] * len(shapes)
    outputs = pearson.pearson_fwd(students, teachers, weights, 1e-6, False)
    loads, stores = traffic.taken()
    features, results = addresses(*students, *teachers), addresses(*outputs)
    assert np.array_equal(loads[np.isin(loads, features)], features)
    assert np.array_equal(stores[np.isin(stores, results)], results)
    assert np.isin(loads, features).sum() + np.isin(loads, stores).sum() == len(loads)  # the rest: partial sums
    blocks = triton.cdiv(max(shape[1] for shape in shapes), pearson.FINISH["CHANNELS"])  # of the finish, a level
    partial = sum(launch.cells for launch in pearson._launches(students, teachers)) + len(shapes) * blocks
    assert len(np.unique(stores)) == len(stores) <= len(results) + partial
    assert not np.isin(stores, features).any()

    dloss, table = torch.tensor(3.0), outputs[2][0]
    dx = pearson.pearson_bwd(dloss, students, teachers, table, dout)
    loads, stores = traffic.taken()
    features = addresses(*students, *teachers, *dout)
    assert np.array_equal(stores, addresses(*dx))
    assert np.array_equal(loads[np.isin(loads, features)], features)
    assert np.isin(loads, np.concatenate([features, addresses(dloss, table)])).all()

    aligned = [[level.clone() for level in side] for side in (students, teachers, dout)]
    again = pearson.pearson_fwd(*aligned[:2], weights, 1e-6, False)
    dx_again = pearson.pearson_bwd(dloss, *aligned[:2], again[2][0], aligned[2])
    for one, other in zip((*outputs, *dx), (*again, *dx_again), strict=True):
        assert torch.equal(one, other)  # and so there is no NaN


@triton.jit
def _careless_body_and_edge(first, last, V: tl.constexpr):
    edge = first + tl.arange(0, 2 * V)
    return first // V * V, (last + V - 1) // V * V, edge, edge < first


def test_the_net_catches_whole_vectors_where_a_chunk_ends_within_one(monkeypatch):
    monkeypatch.setattr(pearson_planes, "_body_and_edge", _careless_body_and_edge)
    levels = [placed((1, 1, 9, 7), "nchw", torch.float32, 0, seed) for seed in range(2)]
    traffic = Traffic(monkeypatch)
    pearson.pearson_fwd(levels[:1], levels[1:], [1.0], 1e-6, False)
    loads, stores = traffic.taken()
    outside = loads[~np.isin(loads, np.concatenate([addresses(*levels), stores]))]
    assert sorted(outside) == [level.data_ptr() + 63 * 4 for level in sorted(levels, key=Tensor.data_ptr)]


KINDS = [
    (torch.float32, torch.float32, "nchw", 0),
    (torch.bfloat16, torch.float32, "nhwc", 0),
    (torch.float32, torch.float32, "nchw", 1),
    (torch.float16, torch.float16, "nhwc", 0),
    (torch.float32, torch.float32, "nchw", 0),
]


@pytest.mark.parametrize(("eps", "skip_constant"), [(1e-6, False), (1e-8, True), (1e-2, True)])
def test_results_are_those_of_the_reference_for_levels_of_every_kind(eps, skip_constant):
    shapes = [(2, 3, 4, 3), (2, 8, 11, 9), (2, 3, 6, 7), (1, 40, 3, 2), (2, 5, 8, 8)]
    weights = [6.0, 0.1, 1.5, 2.0, 1e-3]
    x, y, dout = (
        [
            placed(s, kind[2], kind[side % 2], kind[3], seed=10 * side + i)
            for i, (s, kind) in enumerate(zip(shapes, KINDS, strict=True))
        ]
        for side in range(3)
    )
    x[0][:, 1], y[1][:, 1], y[4][:, 2] = 7.7, 7.7, 0
    constant = [1, 4, 56]  # their columns
    live = [column for column in range(59) if column not in constant]
    results = pearson.pearson_fwd(x, y, weights, eps, skip_constant)
    exact = reference.pearson_fwd([s.double() for s in x], [t.double() for t in y], weights, eps, skip_constant)
    assert [t.shape for t in results] == [t.shape for t in exact]
    assert [t.dtype for t in results] == [torch.float32] * 3 + [torch.float64]
    loss, losses, tables, moments = (t.double() for t in results)
    n, _, _, ss, tt, _ = exact[3]
    units = torch.stack([n, (ss / n).sqrt(), (tt / n).sqrt(), ss, tt, (ss * tt).sqrt()])
    assert ((moments - exact[3]).abs() <= 1e-6 * units + 1e-9).all()
    torch.testing.assert_close(loss, exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses, exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.sum(), loss, rtol=1e-6, atol=0)
    for side, (left, right, added) in enumerate(((x, y, dout), (y, x, []))):
        assert not (skip_constant and tables[side, :3, constant].any())
        simple = [[1], [3], [4]]  # b and the means; a and k are differences
        torch.testing.assert_close(tables[side][simple, live], exact[2][side][simple, live], rtol=1e-5, atol=1e-6)
        dx = pearson.pearson_bwd(torch.tensor(3.0), left, right, results[2][side], added)
        expected = reference.pearson_bwd(torch.tensor(3.0), left, right, tables[side], added)
        for one, other, level in zip(dx, expected, left, strict=True):
            assert one.dtype == level.dtype
            assert one.stride() == level.stride()
            torch.testing.assert_close(one, other)


def test_a_nan_channel_is_not_skipped():
    x, y = (torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x[:, 1], y[:, 3] = 1.0, 5.0
    assert pearson.pearson_fwd([x], [y], [1.0], 1e-6, True)[0].isfinite()
    x[0, 2, 0, 0] = float("nan")
    loss, losses, table, moments = pearson.pearson_fwd([x], [y], [1.0], 1e-6, True)
    expected = reference.pearson_fwd([x], [y], [1.0], 1e-6, True)
    assert loss.isnan() and expected[0].isnan()
    for one, other in zip((losses, table, moments), expected[1:], strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def compiled(monkeypatch, layout: str, dtype: torch.dtype, levels: int, images: int) -> dict[str, int]:
    """How many variants of each kernel are compiled for pyramids of random image sizes, with dout and without."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    kernels = {name: Compilations(getattr(pearson, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        monkeypatch.setattr(pearson, name, kernel)
    draw, dloss = random.Random(0), torch.ones(())
    for _ in range(images):
        size = draw.randint(256, 1600), draw.randint(256, 1600)
        shapes = [(2, 16, *(-(-length // 2 ** (3 + i)) for length in size)) for i in range(levels)]
        x, y, dout = ([torch.empty(s, dtype=dtype, memory_format=LAYOUTS[layout]) for s in shapes] for _ in range(3))
        table = pearson.pearson_fwd(x, y, [draw.random()] * levels, 1e-6, False)[2]
        for side in range(2):
            pearson.pearson_bwd(dloss, x, y, table[side], dout)
            pearson.pearson_bwd(dloss, x, y, table[side])
    return {name: len(kernel.keys) for name, kernel in kernels.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "levels"), [(torch.float32, 5), (torch.bfloat16, 1), (torch.float16, 5)], ids=str)
def test_three_hundred_image_sizes_compile_at_most_two_variants(monkeypatch, dtype, layout, levels):
    found = compiled(monkeypatch, layout, dtype, levels, images=300)
    kind = "plane" if layout == "nchw" else "row"
    expected = dict.fromkeys(KERNELS, 0)
    expected |= {f"_pearson_{kind}_stats_kernel": 1, "_pearson_finish_kernel": 1, "_pearson_sum_kernel": 1}
    assert found == expected | {f"_pearson_{kind}_grad_kernel": 2}  # with dout and without


def test_the_net_catches_sizes_that_invite_variants(monkeypatch):
    monkeypatch.setattr(pearson, "_odd", lambda levels: tuple(size for level in levels for size in level))
    pearson.plan.cache_clear()
    try:
        assert compiled(monkeypatch, "nchw", torch.float32, 5, images=50)["_pearson_plane_stats_kernel"] > 2
    finally:
        pearson.plan.cache_clear()
