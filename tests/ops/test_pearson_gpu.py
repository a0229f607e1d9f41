"""What only a GPU can show of the Pearson loss: real sizes, no synchronisation, graphs, unaligned memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from jdkd._backend import available, use_backend
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.ops import pearson_single
from tests.ops.pearson_cases import DTYPES, assert_as_exact_as_eager

pytestmark = pytest.mark.gpu
GPU_BACKENDS = [name for name in ("triton", "cuda") if available("pearson").get(name, "absent") is None]
PYRAMID = [(2, 256, 100, 168), (2, 256, 50, 84), (2, 256, 25, 42), (2, 256, 13, 21), (2, 256, 7, 11)]


def pyramid(dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    students = [torch.randn(shape, device="cuda") + 3 for shape in PYRAMID]
    teachers = [0.7 * level + torch.randn_like(level) for level in students]
    students, teachers = (
        [level.to(dtype).contiguous(memory_format=layout) for level in side] for side in (students, teachers)
    )
    return [level.requires_grad_() for level in students], teachers


def loss_and_gradients(students: list[Tensor], teachers: list[Tensor], upstream: float = 1.0) -> list[Tensor]:
    loss = pkd_loss(students, teachers, 6.0)
    return [loss.detach(), *torch.autograd.grad(loss, students, torch.full_like(loss, upstream))]


def tapped(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """The tap, whose students get ones from their heads."""
    features, loss = pearson_tap(students, teachers, 6.0)
    ones = [torch.ones_like(feature) for feature in features]
    return [loss.detach(), *torch.autograd.grad([loss, *features], students, [torch.ones_like(loss), *ones])]


def split(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """The loss, and never in a single pass."""
    with mock.patch.object(pearson_single, "fits", return_value=False):
        return loss_and_gradients(students, teachers)


FORMS = (loss_and_gradients, split, tapped)


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 2.0**16], ids=["unscaled", "loss-scale"])
def test_a_pyramid_of_a_detector_agrees_with_float64(name, upstream, dtype, layout):
    students, teachers = pyramid(dtype, layout)
    with use_backend(name):
        loss, *gradients = loss_and_gradients(students, teachers, upstream)
    assert_as_exact_as_eager(loss, gradients, students, teachers, upstream)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_forward_and_backward_never_wait_for_the_device(name, form):
    students, teachers = pyramid(torch.bfloat16, torch.contiguous_format)
    with use_backend(name):
        form(students, teachers)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            form(students, teachers)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_graph_captures_forward_and_backward(name, layout, form):
    students, teachers = pyramid(torch.bfloat16, layout)
    with use_backend(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            form(students, teachers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = form(students, teachers)
        with torch.no_grad():
            for level in (*students, *teachers):
                level.copy_(torch.randn_like(level))
        graph.replay()
        expected = form(students, teachers)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="jdkd._C has no CUDA code")
def test_a_tensor_on_another_device_is_refused_before_anything_runs():
    students, teachers = pyramid(torch.float32, torch.contiguous_format)
    students = [level.detach() for level in students]
    with use_backend("cuda"):
        loss, _, table, _ = torch.ops.jdkd.pearson_fwd(students, teachers, [1.0] * 5, 1e-6, False)
        for dloss, coefficients in ((loss.cpu(), table[0]), (loss, table[0].cpu())):
            with pytest.raises(RuntimeError, match="not on the device of x"):
                torch.ops.jdkd.pearson_bwd(dloss, students, teachers, coefficients, [])
        with pytest.raises(RuntimeError, match="is on another device"):
            torch.ops.jdkd.pearson_fwd(students, [level.cpu() for level in teachers], [1.0] * 5, 1e-6, False)


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_features_at_any_address_are_read_right(name):
    torch.manual_seed(0)
    storage = torch.randn(2, 4 * 33 * 35 + 8, device="cuda").bfloat16()
    for offset in (0, 1, 3, 8):
        student, teacher = storage[:, offset:][:, : 4 * 33 * 35].unbind()
        student, teacher = (level.view(1, 4, 33, 35) for level in (student, teacher))
        student = student.detach().requires_grad_()
        with use_backend(name):
            loss, *gradients = loss_and_gradients([student], [teacher])
        # Tiles begin elsewhere, so that sums are rounded in another order.
        assert_as_exact_as_eager(loss, gradients, [student], [teacher])


def test_new_sizes_compile_nothing():
    kernels = pytest.importorskip("jdkd.kernels.pearson")
    jits = (kernels._pearson_plane_stats_kernel, kernels._pearson_plane_grad_kernel, kernels._pearson_finish_kernel)
    seen = []
    with use_backend("triton"):
        for height, width in ((8, 16), (9, 17), (1, 16), (64, 64), (33, 3)):
            student = torch.randn(2, 5, height, width, device="cuda", requires_grad=True)
            pkd_loss(student, torch.randn_like(student)).backward()
            seen.append(sum(len(jit.device_caches[torch.cuda.current_device()][0]) for jit in jits))
    assert len(set(seen)) == 1
