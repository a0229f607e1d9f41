"""The Triton kernel of the elastic convolution of levels by itself: every tile, what it touches, what it compiles."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from jdkd import _backend
from jdkd.kernels import elastic_conv, elastic_levels
from jdkd.kernels.elastic_levels import Window
from jdkd.ops import elastic_levels_kernels
from tests.compilations import Compilations

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.skipif(not _backend.interpreting(), reason="runs in Triton's interpreter"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


def shipped() -> list:
    """Every tile of every dtype, by descriptors and by pointers; of fp16, which is tiled as bf16 is, the largest."""
    found = []
    for dtype, _, precision in elastic_levels.AOT_KINDS:
        for label, constants, blocks in elastic_levels.aot_tiles(dtype, precision):
            if dtype != "fp16" or "128x128" in label:
                found.append(pytest.param(DTYPES[dtype], precision == "tf32", constants, blocks, id=label))
    return found


def guarded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A dense channels-last tensor with NaN before and behind it."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values = values.contiguous(memory_format=torch.channels_last)
    around = torch.full((values.numel() + 64,), float("nan"), dtype=dtype)
    assert around.data_ptr() % 16 == 0
    return around.as_strided(shape, values.stride(), 32).copy_(values)


def untouched(tensor: Tensor) -> bool:
    """Whether what surrounds a guarded tensor is still NaN."""
    around = tensor.as_strided((tensor.numel() + 64,), (1,), 0)
    return bool(around[:32].isnan().all() and around[-32:].isnan().all())


@pytest.mark.parametrize(("dtype", "allow_tf32", "constants", "blocks"), shipped())
def test_every_shipped_tile_agrees_with_aten_and_stays_inside(monkeypatch, dtype, allow_tf32, constants, blocks):
    monkeypatch.setattr(elastic_levels, "has_tma", lambda device: constants["TMA"])
    monkeypatch.setattr(elastic_levels, "tile", lambda *args, **kwargs: blocks)
    rows, columns = blocks["BLOCK_N"] + 16, blocks["BLOCK_K"] + 16  # of the supernet
    odd = 0 if constants["WIDE"] else 1
    out_channels, in_channels = rows - 8 - odd, columns - 8 - odd  # a tile and a little more
    sizes = ((1, 2, 1), (2, blocks["BLOCK_M"] // 16, 9))  # N, H, W
    xs = [guarded((n, in_channels, h, w), dtype, i) for i, (n, h, w) in enumerate(sizes)]
    ys = [guarded((n, out_channels, h, w), dtype, 7) for n, h, w in sizes]
    weight = guarded((rows, columns, 3, 3), dtype, 8)
    weight[out_channels:], weight[:, in_channels:] = torch.nan, torch.nan
    bias = torch.randn(rows)
    assert elastic_levels.fits(xs, ys, weight)
    options = elastic_levels.settings(xs, ys, weight, allow_tf32)
    assert {key: options[key] for key in constants} == constants

    elastic_levels.elastic_levels_fwd(
        xs, weight, bias, ys, Window(padding=(1, 1)), relu=True, whole=256, allow_tf32=allow_tf32
    )
    active = weight[:out_channels, :in_channels].double(), bias[:out_channels].double()
    for x, y in zip(xs, ys, strict=True):
        exact = F.conv2d(x.double(), *active, padding=1).relu()
        assert (y - exact).abs().max() <= 2 * ROUNDING[dtype] * exact.abs().max()
        assert untouched(y)


@pytest.mark.parametrize(
    "window",
    [Window((2, 1), (1, 2), (1, 1)), Window((1, 3), (0, 1), (2, 1)), Window((2, 2), (4, 3), (1, 2))],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5)], ids=str)
def test_windows_and_centres_of_a_kernel_are_read_in_place(monkeypatch, window, kernel):
    x, weight = guarded((2, 8, 7, 9), torch.float32, 0), guarded((16, 12, 5, 5), torch.float32, 1)
    top, left = (5 - kernel[0]) // 2, (5 - kernel[1]) // 2
    centre = weight[:, :, top : top + kernel[0], left : left + kernel[1]]
    expected = F.conv2d(x, centre[:6, :8], None, *window)
    y = guarded(tuple(expected.shape), torch.float32, 2)
    assert elastic_levels.fits([x], [y], centre)
    called = []
    launch = elastic_conv.elastic_levels_fwd
    monkeypatch.setattr(elastic_conv, "elastic_levels_fwd", lambda *a, **k: (called.append(1), launch(*a, **k)))
    elastic_conv.elastic_conv_fwd(x, centre, None, y, None, None, *window, False)
    assert called
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("relu", [False, True])
def test_other_layouts_take_the_general_kernel(relu):
    x, weight = torch.randn(2, 5, 4, 4), torch.randn(7, 6, 3, 3)
    y = torch.full((2, 3, 4, 4), torch.nan)
    assert not elastic_levels.fits([x], [y], weight)
    lists = torch.tensor([4, 0, 2, 5, 1]), torch.tensor([6, 1, 3])
    elastic_conv.elastic_conv_fwd(x, weight, None, y, *lists, (1, 1), (1, 1), (1, 1), False, relu=relu)
    expected = F.conv2d(x, weight[lists[1]][:, lists[0]], padding=1)
    torch.testing.assert_close(y, expected.relu() if relu else expected)


def test_levels_without_images_and_levels_too_large_are_told_apart():
    empty = [torch.empty(0, 8, 4, 4).contiguous(memory_format=torch.channels_last)]
    elastic_levels.elastic_levels_fwd(empty, torch.zeros(8, 8, 1, 1), None, empty, Window())
    wide = [torch.empty(2, 1, 2**15, 2**14 - 1, device="meta")]
    assert elastic_levels.small(wide, wide) and elastic_levels.MAX_PIXELS == elastic_levels_kernels.MAX_PIXELS
    assert not elastic_levels.small(wide, [torch.empty(2, 1, 2**15, 2**14, device="meta")])


def compiled(monkeypatch, dtype: torch.dtype, *, careless: bool = False) -> int:
    """How many variants a layer compiles over random widths and sizes of its levels."""
    kernel = Compilations(elastic_levels._elastic_levels_fwd_kernel, careless=careless)
    monkeypatch.setattr(elastic_levels, "_elastic_levels_fwd_kernel", kernel)
    draw, weight = random.Random(0), torch.zeros(64, 48, 3, 3, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    for _ in range(200):
        out_channels, in_channels = draw.choice([36, 8 * draw.randint(1, 8)]), 8 * draw.randint(1, 6)
        sizes = [(draw.randint(1, 16), draw.randint(1, 16)) for _ in range(5)]
        xs, ys = (
            [torch.zeros(2, c, *hw, dtype=dtype).contiguous(memory_format=torch.channels_last) for hw in sizes]
            for c in (in_channels, out_channels)
        )
        bias = torch.zeros(65)[draw.randint(0, 1) :]
        elastic_levels.elastic_levels_fwd(xs, weight, bias, ys, Window(padding=(1, 1)), relu=True)
    return len(kernel.keys)


def test_two_hundred_pyramids_compile_at_most_two_variants(monkeypatch):
    assert compiled(monkeypatch, torch.bfloat16) == 2  # rows of y are whole vectors, or 36 channels wide


def test_the_net_catches_sizes_that_invite_variants(monkeypatch):
    assert compiled(monkeypatch, torch.bfloat16, careless=True) > 2
    monkeypatch.undo()
    monkeypatch.setattr(
        elastic_levels, "_odd", lambda xs, ys, m: tuple(s for n, x in zip(m, xs, strict=True) for s in (n, *x.shape))
    )
    assert compiled(monkeypatch, torch.bfloat16) > 2
