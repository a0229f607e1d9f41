"""The Triton kernels of the elastic 1x1 convolution by themselves: every tile, what they touch, what they compile."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from jdkd import _backend
from jdkd.kernels import elastic_pointwise, elastic_pointwise_grad
from jdkd.kernels.elastic_pointwise import _image_rows
from jdkd.reference import elastic_pointwise as reference
from tests.compilations import Compilations

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.skipif(not _backend.interpreting(), reason="runs in Triton's interpreter"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


def shipped() -> list:
    """Every tile of every dtype, by descriptors and by pointers."""
    found = []
    for dtype, _, precision in elastic_pointwise.AOT_KINDS:
        for label, constants, blocks in elastic_pointwise.aot_tiles(dtype, precision):
            found.append(pytest.param(DTYPES[dtype], precision == "tf32", constants, blocks, id=label))
    return found


def guarded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A dense channels-last tensor with NaN before and behind it; a matrix if it has two dimensions."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if values.dim() == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    around = torch.full((values.numel() + 64,), float("nan"), dtype=dtype)
    assert around.data_ptr() % 16 == 0
    return around.as_strided(shape, values.stride(), 32).copy_(values)


@pytest.mark.parametrize(("dtype", "allow_tf32", "constants", "blocks"), shipped())
def test_every_shipped_tile_agrees_with_the_specification_and_stays_inside(
    monkeypatch, dtype, allow_tf32, constants, blocks
):
    monkeypatch.setattr(elastic_pointwise, "has_tma", lambda device: constants["TMA"])
    for module in (elastic_pointwise, elastic_pointwise_grad):
        monkeypatch.setattr(module, "tile", lambda *args, **kwargs: blocks)
    odd = 0 if constants["WIDE"] else 1
    out_channels, in_channels, columns = 136 - odd, 72 - odd, 80
    x = guarded((2, in_channels, 7, 11), dtype, 0)
    weight = guarded((144, columns), dtype, 1)
    weight[out_channels:], weight[:, in_channels:] = torch.nan, torch.nan
    dout = guarded((2, out_channels, 4, 6), dtype, 2)
    y = guarded((2, out_channels, 4, 6), dtype, 3)
    options = elastic_pointwise.settings((x, y), weight, (in_channels, out_channels), allow_tf32)
    assert {key: options[key] for key in ("WIDE", "TMA", "V")} == {key: constants[key] for key in ("WIDE", "TMA", "V")}

    moments = elastic_pointwise.elastic_pointwise_fwd(x, weight, y, stride=2, stats=True, allow_tf32=allow_tf32)
    dx, dweight = torch.zeros_like(x), torch.full((144, columns), 7.0)
    elastic_pointwise_grad.elastic_pointwise_dx(dout, weight, dx, stride=2, allow_tf32=allow_tf32)
    elastic_pointwise_grad.elastic_pointwise_dw(dout, x, dweight, stride=2, allow_tf32=allow_tf32)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = reference.elastic_pointwise(*leaves, out_channels=out_channels, stride=2)
    exact.backward(dout.double())
    pairs = {"y": (y, exact), "dx": (dx, leaves[0].grad)}
    pairs["dweight"] = (dweight[:out_channels, :in_channels], leaves[1].grad[:out_channels, :in_channels])
    pairs["moments"] = (moments, reference.moments(exact))
    for name, (value, like) in pairs.items():
        rounding = ROUNDING[value.dtype]
        assert (value - like).abs().max() <= 2 * rounding * like.abs().max(), name
    assert (dweight[out_channels:] == 7).all() and (dweight[:, in_channels:] == 7).all()


def test_pieces_of_the_positions_are_added_in_one_order():
    dout, x = guarded((2, 8, 41, 40), torch.float32, 0), guarded((2, 8, 41, 40), torch.float32, 1)
    assert elastic_pointwise_grad.pieces(2 * 41 * 40, 1) == 6
    runs = []
    for _ in range(2):
        runs.append(torch.full((8, 8), torch.nan))
        elastic_pointwise_grad.elastic_pointwise_dw(dout, x, runs[-1], allow_tf32=False)
    assert torch.equal(*runs)
    exact = torch.einsum("nohw,nchw->oc", dout.double(), x.double())
    assert (runs[0] - exact).abs().max() <= 1e-6 * exact.abs().max()


@triton.jit
def _rows_kernel(row_ptr, m, height, width, out_height, out_width, stride, STRIDED: tl.constexpr):
    rows = _image_rows(m + tl.arange(0, 2), height, width, out_height, out_width, stride, STRIDED)
    tl.store(row_ptr + tl.arange(0, 2), rows)


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_more_than_2_to_the_31_pixels_are_found(stride):
    height, width, images = 30_001, 30_011, 4  # 3.6e9 pixels
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    for m in (0, out_width - 1, images // stride * out_height * out_width // 2 - 2):
        rows = torch.full((2,), -1)
        _rows_kernel[(1,)](rows, m, height, width, out_height, out_width, stride, STRIDED=stride > 1)
        for position, row in zip((m, m + 1), rows.tolist(), strict=True):
            n, rest = divmod(position, out_height * out_width)
            p, q = divmod(rest, out_width)
            assert row == (n * height + p * stride) * width + q * stride


def compiled(monkeypatch, dtype: torch.dtype, *, careless: bool = False) -> dict[str, int]:
    """How many variants of each kernel a layer compiles over random widths, forward and backward."""
    kernels = {}
    for module in (elastic_pointwise, elastic_pointwise_grad):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels[name] = Compilations(getattr(module, name), careless=careless)
            monkeypatch.setattr(module, name, kernels[name])
    draw, weight = random.Random(0), torch.zeros(512, 256, dtype=dtype)
    dweight = torch.zeros(512, 256)
    for _ in range(200):
        out_channels, in_channels = draw.randint(1, 512), draw.choice([draw.randint(1, 256), 8 * draw.randint(1, 32)])
        x, y = (
            torch.zeros(2, count, 8, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for count in (in_channels, out_channels)
        )
        vectors = torch.zeros(2, out_channels)
        elastic_pointwise.elastic_pointwise_fwd(
            x, weight, y, scale=vectors[0], shift=torch.zeros(out_channels), residual=y, activation="relu"
        )
        elastic_pointwise_grad.elastic_pointwise_dx(y, weight, x)
        elastic_pointwise_grad.elastic_pointwise_dw(y, x, dweight)
    return {name: len(kernel.keys) for name, kernel in kernels.items() if kernel.keys}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])  # fp16 is tiled as bf16 is
def test_two_hundred_widths_compile_at_most_two_variants(monkeypatch, dtype):
    found = compiled(monkeypatch, dtype)
    assert found == {
        "_elastic_pointwise_fwd_kernel": 2,  # rows of whole vectors, and others
        "_elastic_pointwise_dx_kernel": 2,
        "_elastic_pointwise_dw_kernel": 2,
        "_elastic_pointwise_fold_kernel": 1,
    }


def test_the_net_catches_widths_that_invite_variants(monkeypatch):
    assert compiled(monkeypatch, torch.float32, careless=True)["_elastic_pointwise_fwd_kernel"] > 2
