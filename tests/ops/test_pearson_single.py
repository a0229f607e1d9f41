"""The single pass of the Pearson loss: its operators everywhere, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdkd import _ext
from jdkd._backend import available, select, use_backend
from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from jdkd.ops import pearson_single as op
from jdkd.reference import pearson as reference
from jdkd.testing import assert_within_twice
from tests.ops.pearson_cases import CASES, PLAIN, WEIGHT, Case, eager, gradient_unit

OP = "pearson_single"
DTYPES = (torch.float32, torch.bfloat16)
EPS, KEEP = 1e-6, False
PYRAMID = [(2, 256, 100, 168), (2, 256, 50, 84), (2, 256, 25, 42), (2, 256, 13, 21), (2, 256, 7, 11)]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(available(OP)["cuda"] is not None, reason=f"cuda: {available(OP)['cuda']}"),
]
needs_planner = pytest.mark.skipif(_ext.library() is None, reason="jdkd._C is not built")


def gpu(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


def detached(case: Case, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    students, teachers = case.levels(device)
    return [s.detach() for s in students], [t.detach() for t in teachers]


def pyramid(dtype: torch.dtype, shapes=PYRAMID) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    students = [torch.randn(shape, device="cuda") + 3 for shape in shapes]
    teachers = [0.7 * level + torch.randn_like(level) for level in students]
    return [s.to(dtype) for s in students], [t.to(dtype) for t in teachers]


def single(students: list[Tensor], teachers: list[Tensor], weight: float = WEIGHT):
    return torch.ops.jdkd.pearson_single(students, teachers, [weight] * len(students), EPS, KEEP)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_eager_formula_in_float32(backend, device, name, dtype):
    students, teachers = detached(Case(**{**vars(CASES[name]), "dtype": dtype}), device)
    loss, losses, table, gradients = single(students, teachers)
    exact, rough = (eager(students, teachers, wide, 1.0) for wide in (torch.float64, torch.float32))
    assert_within_twice(loss, rough[0], exact[0], what="loss", scale=exact[0].clamp(min=CASES[name].loss_unit))
    torch.testing.assert_close(losses.sum(), loss)
    for i, (x, y, dx) in enumerate(zip(students, teachers, gradients, strict=True)):
        assert dx.dtype == x.dtype and dx.stride() == x.stride()
        unit = gradient_unit(x, y, 1.0)
        assert_within_twice(dx, rough[i + 1].to(x.dtype), exact[i + 1], what=f"gradient {i}", scale=unit)
    teachers_dx = torch.ops.jdkd.pearson_bwd(torch.ones((), device=device), teachers, students, table[1], [])
    for i, (x, y, dx) in enumerate(zip(teachers, students, teachers_dx, strict=True)):
        expected, unit = len(students) + i + 1, gradient_unit(x, y, 1.0)
        what = f"teacher's gradient {i}"
        assert_within_twice(dx, rough[expected].to(x.dtype), exact[expected], what=what, scale=unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0, 3.0, -0.1])
def test_scaling_rounds_once_and_leaves_gradients_alone_for_a_factor_of_one(backend, device, dtype, factor):
    storage = torch.randn(3, 1000, device=device).to(dtype)
    gradients = [part.clone() for part in storage] + [storage[0].clone()[1:986], storage[0].clone()[3:]]
    gradients = [g.view(1, 1, 1, -1) for g in gradients]
    expected = [(factor * g.double().float()).to(dtype) for g in gradients]
    torch.ops.jdkd.pearson_scale_(gradients, torch.tensor(factor, device=device))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_the_operators_pass_opcheck(backend, device):
    students, teachers = detached(PLAIN, device)
    arguments = students, teachers, [1.0, 2.0], EPS, True
    torch.library.opcheck(torch.ops.jdkd.pearson_single.default, arguments)
    gradients = torch.ops.jdkd.pearson_single(*arguments)[3]
    torch.library.opcheck(torch.ops.jdkd.pearson_scale_.default, (gradients, torch.tensor(2.0, device=device)))


def test_weights_eps_and_constant_channels_are_the_references(backend, device):
    students, teachers = detached(PLAIN, device)
    students[0][:, 1] = 0.7
    for skip in (False, True):
        loss, losses, table, gradients = torch.ops.jdkd.pearson_single(students, teachers, [0.5, 2.0], 1e-3, skip)
        expected = reference.pearson_fwd(students, teachers, [0.5, 2.0], 1e-3, skip)
        for ours, theirs in zip((loss, losses), expected[:2], strict=True):
            torch.testing.assert_close(ours, theirs)
        dx = reference.pearson_bwd(torch.ones_like(loss), students, teachers, expected[2][0])
        for ours, theirs in zip(gradients, dx, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert (table[:, :3, 1] == 0).all() == skip


def test_strided_levels_are_refused_with_the_remedy():
    students, teachers = detached(Case(channels_last=True, shapes=((2, 3, 4, 5),)))
    with pytest.raises(InputError, match=r"\(2, 3, 4, 5\) has strides .*contiguous\(\)"):
        single(students, teachers)


def test_the_reference_computes_what_no_kernel_of_this_device_does():
    assert list(available(OP)) == ["cuda", "cpu", "reference"]  # whether one runs is for jdkd.ops.pearson_forms to say
    assert select(OP, torch.zeros(1, dtype=torch.float16), "single pass") == "reference"


@needs_planner
def test_what_fits_depends_on_the_chip_alone():
    p2, p3 = (8, 256, 200 * 336), (16, 256, 100 * 168)
    hopper, without_clusters = (132, 232_448, 233_472, 16), (108, 166_912, 167_936, 0)
    assert op._planned((p2, p3), 2, hopper)
    assert not op._planned((p2, p3), 4, hopper)
    assert not op._planned((p3,), 2, without_clusters)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [1, 2, 3, 8, 16])
def test_a_pyramid_agrees_with_float64(dtype, images):
    students, teachers = pyramid(dtype, [(images, 64, *shape[2:]) for shape in PYRAMID])
    assert op.fits(students, teachers)
    with use_backend("cuda"):
        loss, _, _, gradients = single(students, teachers)
    wide = [level.double().requires_grad_() for level in students]
    exact = reference.pkd_loss(wide, [level.double() for level in teachers], WEIGHT)
    assert abs(loss.item() - exact.item()) < 1e-6 * exact.item()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@gpu
def test_a_loss_near_a_correlation_of_one_keeps_its_digits():
    students, teachers = detached(Case(shapes=((2, 3, 100, 168),), mean=300.0, r=1 - 5e-7), "cuda")
    with use_backend("cuda"):
        loss = single(students, teachers, 1.0)[0]
    exact = reference.pkd_loss([s.double() for s in students], [t.double() for t in teachers])
    assert exact < 1e-6 and abs(loss - exact) < 1e-3 * exact


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype):
    students, teachers = pyramid(dtype)
    with use_backend("cuda"):
        runs = [single(students, teachers) for _ in range(3)]
    for run in runs[1:]:
        for ours, theirs in zip((*run[:3], *run[3]), (*runs[0][:3], *runs[0][3]), strict=True):
            assert torch.equal(ours, theirs)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_at_any_address_are_read_right(dtype):
    torch.manual_seed(0)
    shape, count = (2, 3, 33, 35), 2 * 3 * 33 * 35
    storage = torch.randn(2, count + 8, device="cuda").to(dtype)
    for offset in (0, 1, 3, 8):
        student, teacher = (level.view(shape) for level in storage[:, offset:][:, :count].unbind())
        with use_backend("cuda"):
            ours = single([student], [teacher])
            expected = single([student.clone()], [teacher.clone()])
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[3], expected[3], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)


@gpu
def test_levels_that_do_not_fit_are_refused():
    students, teachers = pyramid(torch.float32, [(16, 2, 200, 336)])
    assert not op.fits(students, teachers)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="level 0, 16 x 67200 positions"):
        single(students, teachers)


@gpu
def test_a_factor_that_is_not_on_the_gpu_is_refused():
    gradients = [torch.ones(1, 2, 3, 4, device="cuda")]
    with use_backend("cuda"), pytest.raises(RuntimeError, match="dloss is not on the device of the gradients"):
        torch.ops.jdkd.pearson_scale_(gradients, torch.tensor(2.0))


@gpu
def test_no_call_waits_for_the_device():
    students, teachers = pyramid(torch.bfloat16)
    dloss = torch.full((), 2.0, device="cuda")
    with use_backend("cuda"):
        single(students, teachers)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert op.fits(students, teachers)
            torch.ops.jdkd.pearson_scale_(single(students, teachers)[3], dloss)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_graph_captures_loss_gradient_and_scaling():
    students, teachers = pyramid(torch.bfloat16)
    dloss = torch.full((), 2.0, device="cuda")

    def step() -> list[Tensor]:
        loss, losses, table, gradients = single(students, teachers)
        torch.ops.jdkd.pearson_scale_(gradients, dloss)
        return [loss, losses, table, *gradients]

    with use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for level in (*students, *teachers):
            level.copy_(torch.randn_like(level))
        dloss.fill_(3.0)
        graph.replay()
        expected = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@gpu
def test_agrees_with_the_split_form():
    students, teachers = pyramid(torch.float32)
    with use_backend("cuda"):
        loss, _, _, gradients = single(students, teachers)
        leaves = [s.clone().requires_grad_() for s in students]
        other = pkd_loss(leaves, teachers, WEIGHT)
        other.backward()
    torch.testing.assert_close(loss, other.detach(), rtol=1e-6, atol=0)
    for ours, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-4, atol=1e-9)
