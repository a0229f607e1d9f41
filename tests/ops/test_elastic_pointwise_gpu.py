"""What only a GPU can show of the elastic 1x1 convolution: real sizes through TMA, no waiting, graph capture."""

from __future__ import annotations

import contextlib

import pytest
import torch

from jdkd._backend import use_backend
from tests.ops.elastic_pointwise_cases import Problem, results

pytestmark = pytest.mark.gpu

SHAPES = {  # of ResNet-50 and its pyramid at 800x1344, batch 2: Cout_max, Cin_max; Cout, Cin; N, H, W; stride
    "C2 expand": ((256, 64), (128, 32), (2, 200, 336), 1),
    "C4 reduce": ((256, 1024), (128, 512), (2, 50, 84), 1),
    "C4 expand": ((1024, 256), (1024, 256), (2, 50, 84), 1),
    "C5 shortcut": ((2048, 1024), (1024, 512), (2, 50, 84), 2),
    "lateral P3, odd": ((256, 512), (250, 333), (2, 100, 168), 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 2**-10, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _problem(shape: tuple, epilogue: str) -> Problem:
    weight, active, image, stride = shape
    return Problem(weight, active, image, stride, epilogue)


def _assert_close(found: dict, expected: dict, rounding: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.double() - expected[name]).abs().max() <= 4 * rounding * expected[name].abs().max(), name


@shapes
@pytest.mark.parametrize("epilogue", ["plain", "affine", "add", "stats"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_kernels_agree_with_float64_at_real_sizes(monkeypatch, descriptors, dtype, epilogue, shape):
    from jdkd.kernels import elastic_pointwise

    if descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need sm_90")
    monkeypatch.setattr(elastic_pointwise, "has_tma", lambda device: descriptors)
    problem = _problem(shape, epilogue)
    tensors = problem.tensors(dtype, "cuda")
    with use_backend("triton"):
        found = results(problem.ours, tensors)
    douts = found.pop("douts")
    exact = results(problem.specified, {name: tensor.double() for name, tensor in tensors.items()}, douts)
    exact.pop("douts")
    _assert_close(found, exact, ROUNDING[dtype])


@shapes
def test_a_bottleneck_ends_in_the_same_pass_as_its_convolution(shape):
    problem = _problem(shape, "bottleneck")
    tensors = problem.tensors(torch.bfloat16, "cuda")
    with use_backend("triton"), torch.no_grad():
        (y,) = problem.ours(**tensors)
        (exact,) = problem.specified(**{name: tensor.double() for name, tensor in tensors.items()})
    _assert_close({"y": y}, {"y": exact}, 2**-8)


@pytest.mark.parametrize("epilogue", ["bottleneck", "stats"])
def test_two_runs_give_the_same_bits(epilogue):
    problem = _problem(SHAPES["C4 reduce"], epilogue)
    tensors = problem.tensors(torch.bfloat16, "cuda")
    with use_backend("triton"):
        first, second = results(problem.ours, tensors), results(problem.ours, tensors)
    assert first.pop("douts") and second.pop("douts")
    assert all(torch.equal(first[name], second[name]) for name in first)


@contextlib.contextmanager
def _no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("route", ["reference", "triton"])
def test_a_new_width_never_waits_for_the_device(route):
    weight = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def step(width: int) -> None:
        from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d_stats

        y, mean, _ = elastic_pointwise_conv2d_stats(inputs[width], weight, out_channels=width)
        (y.float().sum() + mean.sum()).backward()

    inputs = {
        width: torch.randn(2, width, 25, 42, device="cuda", dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        for width in (64, 100, 128, 250)
    }
    with use_backend(route):
        step(64)  # compiles both variants: rows of whole vectors, and others
        step(100)
        with _no_waiting():
            for width in inputs:
                step(width)


@pytest.mark.parametrize("route", ["reference", "triton"])
def test_a_fixed_width_is_captured_in_a_graph(route):
    problem = _problem(SHAPES["C4 reduce"], "bottleneck")
    tensors = problem.tensors(torch.bfloat16, "cuda")
    with use_backend(route), torch.no_grad():
        problem.ours(**tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (y,) = problem.ours(**tensors)
        for name in ("x", "weight"):  # the descriptor holds an address, not values
            tensors[name].normal_()
        graph.replay()
        torch.testing.assert_close(y, problem.ours(**tensors)[0])
