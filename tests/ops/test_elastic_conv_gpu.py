"""What only a GPU can show of the elastic convolution: real sizes, TF32, no waiting, graph capture."""

import pytest
import torch
import torch.nn.functional as F

from jdkd._backend import use_backend
from jdkd.nn import ElasticBatchNorm2d, ElasticConv2d

pytestmark = pytest.mark.gpu

SHAPES = {  # N, H, W, kernel, stride
    "P3": (2, 100, 168, 3, 1),
    "P5": (2, 25, 42, 3, 1),
    "P7": (1, 7, 11, 3, 1),
    "C4-1x1": (2, 50, 84, 1, 1),
    "C3-strided": (2, 100, 168, 3, 2),
}
LISTED = list(range(255, 0, -2))


def _half_width(kernel: int, stride: int, listed: bool) -> ElasticConv2d:
    torch.manual_seed(0)
    layer = ElasticConv2d(256, 256, kernel, stride, kernel // 2, device="cuda")
    layer.to(memory_format=torch.channels_last)
    layer.set_active(LISTED if listed else 128, LISTED if listed else 128)
    return layer


@pytest.mark.parametrize("listed", [False, True], ids=["leading", "listed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["tf32", "bf16", "fp16"])
def test_kernel_agrees_with_cudnn_at_real_sizes(dtype, shape, listed):
    n, height, width, kernel, stride = shape
    layer = _half_width(kernel, stride, listed).to(dtype)
    x = torch.randn(n, 128, height, width, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), *(p.double() for p in layer.export().parameters()), stride, kernel // 2)
    rounding = {torch.float32: 2**-10, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    with use_backend("triton"), torch.no_grad():
        y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - exact).abs().max() <= 4 * rounding * exact.abs().max()


@pytest.mark.parametrize("route", ["reference", "triton"])
def test_changing_and_running_a_subnet_never_waits_for_the_device(route):
    layer, norm = _half_width(3, 1, False), ElasticBatchNorm2d(256, device="cuda")
    inputs = {count: torch.randn(2, count, 25, 42, device="cuda") for count in (64, 128)}
    chosen = [64, 128, LISTED, torch.tensor(LISTED, device="cuda")]

    def steps() -> None:
        for channels in chosen:
            layer.set_active(channels, channels)
            norm.set_active(channels)
            norm(layer(inputs[layer.active_in_channels])).sum().backward()

    with use_backend(route):
        steps()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("route", ["reference", "triton"])
@pytest.mark.parametrize("listed", [False, True], ids=["leading", "listed"])
def test_a_fixed_subnet_is_captured_in_a_graph(route, listed):
    layer = _half_width(3, 1, listed)
    x = torch.randn(2, 128, 25, 42, device="cuda")
    with use_backend(route), torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
