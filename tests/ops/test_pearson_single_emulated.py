"""The single pass of the Pearson loss, thread by thread on the host, against the 2x rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jdkd import _ext
from jdkd.ops import pearson_planner
from jdkd.reference import pearson as reference
from tests.ops.emulated import Emulation, placed
from tests.ops.pearson_cases import CASES, PLAIN, WEIGHT, Case, assert_as_exact_as_eager

DTYPES = (torch.float32, torch.bfloat16)
# SMs, shared memory per block and per SM, largest cluster. The smaller the memory, the larger the clusters.
HOPPER = (1, 232_448, 233_472, 16)
SMALL = (1, 9_216, 24_576, 16)
TINY = (1, 3_072 + 2_048, 18_432, 16)
SPREAD = (10_000, 232_448, 233_472, 8)


@pytest.fixture
def guarded(emulation: Emulation) -> Iterator[Emulation]:
    """With tensors that begin at pages, and so at whole vectors."""
    with emulation.memory("begin"):
        yield emulation


def single_pass(
    emulation: Emulation,
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    chip: tuple[int, ...] = HOPPER,
    eps: float = 1e-6,
    skip_constant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, losses, table and the students' gradients."""
    emulation.choose_chip(*chip)
    return emulation.ops.pearson_single(students, teachers, weights, eps, skip_constant)


def run(emulation: Emulation, case: Case, chip: tuple[int, ...] = HOPPER, *, aligned: bool = True) -> None:
    """Holds loss and students' gradients to the 2x rule, with an upstream of 1, and the table to the reference's."""
    with emulation.memory("begin"):
        students = [placed(level, 0 if aligned else 1) for level in case.levels()[0]]
    with emulation.memory("begin" if aligned else "end"):
        teachers = [placed(level, 0) for level in case.levels()[1]]
        weights = [WEIGHT] * len(students)
        loss, losses, table, gradients = single_pass(emulation, students, teachers, weights, chip)
    assert_as_exact_as_eager(loss, gradients, students, teachers)
    _, expected_losses, expected, _ = reference.pearson_fwd(students, teachers, weights)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[:, 3:], expected[:, 3:], rtol=1e-6, atol=1e-6)


def largest_cluster(case: Case, chip: tuple[int, ...]) -> int:
    """Blocks of the largest cluster that the planner makes."""
    if _ext.library() is None:
        pytest.skip("needs jdkd._C")
    shapes = [(n, c, h * w) for n, c, h, w in case.shapes]
    return max(launch.cluster for launch in pearson_planner.plan(shapes, case.dtype.itemsize, chip).launches)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_eager_formula_in_float32(emulation, name, aligned):
    dtype = DTYPES[([*CASES].index(name) + aligned) % len(DTYPES)]  # these take turns
    run(emulation, replace(CASES[name], dtype=dtype), aligned=aligned)


@pytest.mark.parametrize(
    ("chip", "shapes", "cluster", "dtype"),
    [
        (SMALL, ((2, 3, 20, 20),), 2, torch.float32),
        (SMALL, ((2, 3, 20, 20),), 2, torch.bfloat16),
        (SMALL, ((3, 2, 37, 41), (3, 5, 19, 21), (3, 20, 5, 3)), 16, torch.float32),
        (TINY, ((16, 2, 16, 16), (16, 3, 8, 8), (16, 5, 1, 1)), 16, torch.float32),
        (TINY, ((16, 2, 16, 16), (16, 3, 8, 8), (16, 5, 1, 1)), 16, torch.bfloat16),
        (TINY, ((5, 2, 23, 29),), 16, torch.float32),
        (SPREAD, ((2, 3, 40, 20), (2, 9, 7, 11)), 8, torch.float32),
        (SPREAD, ((2, 3, 40, 20), (2, 9, 7, 11)), 8, torch.bfloat16),
    ],
)
def test_channels_may_be_cut_over_clusters_or_packed_into_them(emulation, dtype, chip, shapes, cluster):
    case = Case(shapes=shapes, mean=3.0, dtype=dtype)
    assert dtype == torch.bfloat16 or largest_cluster(case, chip) == cluster
    run(emulation, case, chip)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 100, 168), torch.float32), ((4, 1, 200, 336), torch.bfloat16), ((16, 9, 25, 42), torch.float32)],
    ids=str,
)
def test_channels_of_a_detector_keep_the_rule_on_the_chip_they_are_meant_for(emulation, dtype, shape):
    run(emulation, Case(shapes=(shape,), mean=300.0, dtype=dtype))


def test_a_loss_near_a_correlation_of_one_keeps_its_digits(guarded):
    case = Case(shapes=((2, 3, 31, 33),), mean=300.0, r=1 - 5e-7)
    students, teachers = ([level.detach() for level in side] for side in case.levels())
    loss = single_pass(guarded, students, teachers, [1.0], chip=SMALL)[0]
    exact = reference.pkd_loss([s.double() for s in students], [t.double() for t in teachers])
    assert exact < 1e-6 and abs(loss - exact) < 1e-3 * exact


def test_weights_eps_and_constant_channels_are_as_in_the_reference(guarded):
    students, teachers = (
        [level.detach() for level in side] for side in Case(shapes=((2, 3, 9, 7), (1, 4, 6, 5))).levels()
    )
    students[0][:, 1], teachers[1][:, 2] = 0.7, -3.0
    students[0][0, 2, 0, 0] = float("nan")
    for skip_constant in (True, False):
        settings = [0.5, 2.0], 1e-3, skip_constant
        _, losses, table, gradients = single_pass(guarded, students, teachers, settings[0], HOPPER, *settings[1:])
        _, expected, expected_table, _ = reference.pearson_fwd(students, teachers, *settings)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        expected_gradients = reference.pearson_bwd(torch.tensor(1.0), students, teachers, expected_table[0])
        for dx, expected_dx in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert losses[0].isnan() and losses[1].isfinite()
        if skip_constant:
            assert (table[:, :3, 1] == 0).all() and (gradients[0][:, 1] == 0).all() and (gradients[1][:, 2] == 0).all()


def test_two_runs_with_copies_landing_in_another_order_give_the_same_bits(guarded):
    case = Case(shapes=((3, 2, 60, 41),))
    assert largest_cluster(case, SMALL) == 16
    sides = [[level.detach() for level in side] for side in case.levels()]
    runs = [single_pass(guarded, *sides, [1.0], SMALL) for _ in range(2)]
    (*found, (gradient,)), (*again, (gradient_again,)) = runs
    assert all(torch.equal(a, b) for a, b in zip((*found, gradient), (*again, gradient_again), strict=True))


@pytest.mark.parametrize("count", [1, 2, 16])
def test_losses_of_levels_with_more_parts_than_their_threads_take_at_once(guarded, count):
    shapes = ((2, 530, 1, 1), (1, 3, 2, 1), (3, 40, 1, 2), (2, 1, 3, 1))
    students, teachers = ([level.detach() for level in side] for side in Case(shapes=(shapes * 4)[:count]).levels())
    weights = [1.0 + i for i in range(count)]
    loss, losses, _, _ = single_pass(guarded, students, teachers, weights)
    expected, expected_losses, _, _ = reference.pearson_fwd(students, teachers, weights)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_plain_case_fills_every_cell(guarded):
    students, teachers = ([level.detach() for level in side] for side in PLAIN.levels())
    loss, losses, table, gradients = single_pass(guarded, students, teachers, [1.0, 1.0])
    assert all(t.isfinite().all() for t in (loss, losses, table, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["begin", "end"])
def test_an_upstream_gradient_scales_every_element_once(emulation, where, dtype):
    with emulation.memory(where):
        gradients = [torch.randn(shape).to(dtype) for shape in ((2, 3, 25, 43), (1, 5, 7, 11), (1, 1, 1, 3))]
        expected = [(3.0 * gradient.float()).to(dtype) for gradient in gradients]
        emulation.ops.pearson_scale_(gradients, torch.tensor(3.0))
    assert all(torch.equal(found, wanted) for found, wanted in zip(gradients, expected, strict=True))
