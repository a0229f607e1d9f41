"""What only a GPU can show of the elastic convolution of levels: every tile, real sizes, no waiting, graphs."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd._backend import use_backend
from jdkd.experimental import ElasticLevelsConv2d
from jdkd.functional import elastic_conv2d_levels

pytestmark = pytest.mark.gpu

PYRAMID = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # P3 to P7 at 800x1333
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TILES, CONFIGURATIONS = 25, 24  # how many there are: a test holds it, and none is imported to collect them
ROUNDING = {torch.float32: 2**-10, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def tiles() -> list[tuple[str, str, str, dict, dict]]:
    """Dtype, precision, label, constants and blocks of every tile that can be launched."""
    from jdkd.kernels import elastic_levels

    kinds = [(kind, precision) for kind, _, precision in elastic_levels.AOT_KINDS]
    return [(*kind, *tile) for kind in kinds for tile in elastic_levels.aot_tiles(*kind)]


def _images(channels: int, dtype: torch.dtype, sizes=PYRAMID) -> list[Tensor]:
    images = (torch.randn(2, channels, *size, device="cuda", dtype=dtype) for size in sizes)
    return [x.contiguous(memory_format=torch.channels_last) for x in images]


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    poisoned = torch.full(shape, torch.nan, device="cuda", dtype=dtype)
    return poisoned.contiguous(memory_format=torch.channels_last)


def _exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=weight.shape[2] // 2).relu()


def _close(y: Tensor, exact: Tensor, rounding: float) -> bool:
    return bool((y - exact).abs().max() <= 4 * rounding * exact.abs().max())


@pytest.mark.parametrize("number", range(TILES))
def test_every_tile_agrees_with_aten_as_it_is_launched(monkeypatch, number):
    """A miscompiled kernel gives wrong numbers and no error: nothing that can be launched goes unseen."""
    from jdkd.kernels import elastic_levels

    kind, precision, label, constants, blocks = tiles()[number]
    dtype, exactly = DTYPES[kind], precision == "ieee"
    if constants["TMA"] and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need sm_90")
    monkeypatch.setattr(elastic_levels, "has_tma", lambda device: constants["TMA"])
    monkeypatch.setattr(elastic_levels, "tile", lambda *args, **kwargs: blocks)
    odd, wrong = 0 if constants["WIDE"] else 1, []
    for levels, out_channels, relu in ((1, 200, False), (5, 200, True), (5, 131, True)):
        torch.manual_seed(0)
        xs = _images(136 - odd, dtype, PYRAMID[-levels:])
        weight = torch.randn(256, 160, 3, 3, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(256, device="cuda")
        ys = [_poisoned(2, out_channels, *x.shape[2:], dtype=dtype) for x in xs]
        elastic_levels.elastic_levels_fwd(
            xs, weight, bias, ys, elastic_levels.Window(padding=(1, 1)), relu=relu, allow_tf32=not exactly
        )
        for x, y in zip(xs, ys, strict=True):
            active = weight[:out_channels, : x.shape[1]].double(), bias[:out_channels].double()
            exact = F.conv2d(x.double(), *active, padding=1)
            if not _close(y, exact.relu() if relu else exact, 2**-20 if exactly else ROUNDING[dtype]):
                wrong.append(f"{label} x{levels} {out_channels} at {tuple(x.shape)}")
    assert wrong == []


@pytest.mark.parametrize("case", range(CONFIGURATIONS))
def test_every_configuration_of_the_general_kernel_agrees_with_aten_as_it_is_launched(monkeypatch, case):
    from jdkd.kernels import elastic_conv
    from tests.ops.elastic_conv_aot import configurations

    case = configurations()[case]
    dtype, weight_dtype, exactly = DTYPES[case["x"]], DTYPES[case["weight"]], case["precision"] == "ieee"
    layout = torch.channels_last if case["channels_last"] else torch.contiguous_format
    monkeypatch.setattr(elastic_conv, "fits", lambda *args: False)
    monkeypatch.setattr(elastic_conv, "tile", lambda *args, **kwargs: case["tile"])
    torch.manual_seed(0)
    x = torch.randn(2, 144, 25, 42, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(256, 160, *[case["taps"]] * 2, device="cuda", dtype=weight_dtype)
    weight = weight.contiguous(memory_format=layout)
    rows, columns = (torch.randperm(n, device="cuda")[:k] for n, k in ((256, 208), (160, 144)))
    if not case["listed"]:
        rows, columns = (torch.arange(k, device="cuda") for k in (208, 144))
    lists = (columns, rows) if case["listed"] else (None, None)
    y = torch.full((2, 208, 25, 42), torch.nan, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    bias, pad = torch.randn(256, device="cuda"), (case["taps"] // 2,) * 2
    elastic_conv.elastic_conv_fwd(x, weight, bias, y, *lists, (1, 1), pad, (1, 1), not exactly, relu=True)
    exact = _exact(x, weight[rows][:, columns].to(dtype), bias[rows])
    assert _close(y, exact, 2**-20 if exactly else ROUNDING[dtype])


@pytest.mark.parametrize("outputs", [256, 128, 36, list(range(255, 0, -2))], ids=["full", "half", "36", "listed"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_pyramid_agrees_with_float64_at_real_sizes(dtype, outputs):
    torch.manual_seed(0)
    weight = torch.randn(256, 256, 3, 3, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias, xs = torch.randn(256, device="cuda", dtype=dtype), _images(128, dtype)
    rows = torch.tensor(outputs if isinstance(outputs, list) else range(outputs), device="cuda")
    tensors = [t.requires_grad_() for t in (weight, bias, *xs)]
    with use_backend("triton"):
        ys = elastic_conv2d_levels(
            xs, weight, bias, in_channels=128, out_channels=outputs, padding=1, activation="relu"
        )
        found = torch.autograd.grad(ys, tensors, [torch.ones_like(y) for y in ys])
    for x, y in zip(xs, ys, strict=True):
        assert _close(y, _exact(x, weight[rows][:, :128], bias[rows]), ROUNDING[dtype])
    plain = [F.conv2d(x, weight[rows][:, :128], bias[rows], padding=1) for x in xs]
    masked = [(y > 0).to(y.dtype) for y in ys]
    expected = torch.autograd.grad(plain, tensors, masked)
    for name, value, like in zip(("dweight", "dbias", *["dx"] * 5), found, expected, strict=True):
        assert (value - like).abs().max() <= 16 * ROUNDING[dtype] * like.abs().max(), name


@contextlib.contextmanager
def _no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("route", ["reference", "triton"])
def test_a_new_width_or_size_never_waits_for_the_device(route):
    layer = ElasticLevelsConv2d(256, 256, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    layer.to(memory_format=torch.channels_last)
    wide, narrow = _images(256, torch.bfloat16), _images(64, torch.bfloat16, (*PYRAMID[1:], (4, 6)))

    def steps() -> None:
        for xs, outputs in ((wide, 256), (narrow, 128)):
            layer.set_active(xs[0].shape[1], outputs)
            sum(y.float().sum() for y in layer(xs)).backward()

    with use_backend(route):
        steps()
        with _no_waiting():
            steps()


@pytest.mark.parametrize("route", ["reference", "triton"])
def test_a_fixed_subnet_is_captured_in_a_graph(route):
    layer = ElasticLevelsConv2d(256, 256, 3, padding=1, device="cuda", dtype=torch.bfloat16, activation="relu")
    layer.to(memory_format=torch.channels_last)
    layer.set_active(128, 128)
    xs = _images(128, torch.bfloat16)
    with use_backend(route), torch.no_grad():
        layer(xs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = layer(xs)
        for tensor in (*xs, layer.weight):
            tensor.normal_()
        graph.replay()
        for y, expected in zip(ys, layer(xs), strict=True):
            torch.testing.assert_close(y, expected)
