"""The numbers of the Pearson loss: every backend against float64, by the 2x rule."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from jdkd.functional import pkd_loss
from jdkd.ops import pearson as op
from jdkd.reference import pearson as reference
from tests.ops.pearson_cases import CASES, DTYPES, PLAIN, WEIGHT, Case, check, like, variants
from tests.ops.turns import take_turns

OP = "pearson"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter


@pytest.mark.parametrize("variant", variants(), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_eager_formula_in_float32(backend, device, name, variant):
    take_turns(backend, device, [*CASES].index(name), variant.dtype, variant.channels_last)
    check(like(CASES[name], variant), device)


@pytest.mark.parametrize("variant", variants(), ids=str)
@pytest.mark.parametrize(
    "name", ["odd_sizes", "many_tiles_and_chunks", "large_mean", "almost_equal_and_large_mean", "one_element_and_1x1"]
)
def test_the_tap_is_as_exact_as_adding_in_float32(backend, device, name, variant):
    take_turns(backend, device, [*CASES].index(name), variant.dtype, variant.channels_last)
    check(like(CASES[name], variant), device, tap=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_float16_gradients_survive_a_loss_scale_of_65536(backend, device, channels_last):
    case = Case(shapes=((2, 8, 24, 20),), upstream=2.0**16, dtype=torch.float16, channels_last=channels_last)
    check(case, device)
    students, teachers = case.levels(device)
    pkd_loss(students, teachers, WEIGHT).backward(torch.tensor(2.0**16, device=device))
    assert (students[0].grad == 0).double().mean() < 0.01


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "teacher_dtype"), [*itertools.permutations(DTYPES, 2)])
def test_student_and_teacher_may_differ_in_dtype(backend, device, dtype, teacher_dtype, channels_last):
    take_turns(backend, device, 1 + DTYPES.index(teacher_dtype), dtype, channels_last)
    check(replace(PLAIN, dtype=dtype, teacher_dtype=teacher_dtype, channels_last=channels_last), device)


def test_levels_may_differ_in_dtype_and_layout(backend, device):
    kinds = [(torch.float32, False), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False)]
    pairs = [replace(PLAIN, shapes=((2, 4, 5, 6),), dtype=d, channels_last=last).levels(device) for d, last in kinds]
    students, teachers = [s[0] for s, _ in pairs], [t[0] for _, t in pairs]
    together = pkd_loss(students, teachers)
    together.backward()
    for student, teacher in zip(students, teachers, strict=True):
        alone = student.detach().requires_grad_()
        loss = pkd_loss(alone, teacher.detach())
        loss.backward()
        assert torch.equal(alone.grad, student.grad)
        torch.testing.assert_close(together, 4 * loss, rtol=1e-2, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_two_runs_give_the_same_bits(backend, device, channels_last):
    students, teachers = Case(shapes=((1, 2, 60, 40),), channels_last=channels_last).levels(device)
    runs = []
    for _ in range(2):
        loss = pkd_loss(students, teachers)
        runs.append((loss, *torch.autograd.grad(loss, students)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_number_of_threads_changes_nothing():
    students, teachers = Case(shapes=((2, 19, 60, 60), (2, 19, 30, 31))).levels()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = pkd_loss(students, teachers)
            results.append((loss, *torch.autograd.grad(loss, students)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_reference_is_differentiated_right_in_float64():
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    levels += [torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda s, t, u, v: pkd_loss([s, u], [t, v], 6.0), levels)


def test_the_numbers_are_those_of_the_published_formula():
    """Unbiased deviation, 1e-6 added to it, half the mean square, summed over levels: written out once more."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    a = s.transpose(0, 1).reshape(3, -1)  # [C, NHW]
    b = t.transpose(0, 1).reshape(3, -1)
    difference = (a - a.mean(1, keepdim=True)) / (a.var(1, correction=1, keepdim=True).sqrt() + 1e-6)
    difference -= (b - b.mean(1, keepdim=True)) / (b.var(1, correction=1, keepdim=True).sqrt() + 1e-6)
    expected = 6 * 2 * difference.square().mean() / 2
    torch.testing.assert_close(pkd_loss([s, s], [t, t], 6.0), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(reference.pkd_loss([s, s], [t, t], 6.0), expected, rtol=1e-12, atol=0)


def test_nan_in_a_feature_reaches_the_loss(backend, device):
    for side in (0, 1):
        levels = PLAIN.levels(device)
        with torch.no_grad():
            levels[side][0][1, 2, 3, 4] = float("nan")
        assert pkd_loss(*levels).isnan()


def _loss_a_little_off(loss, losses, table, moments):
    return loss * (1 + 2e-6), losses, table, moments


def _means_folded(loss, losses, table, moments):
    folded = table.clone()
    folded[:, 2] = -(table[:, 0] * table[:, 3] + table[:, 1] * table[:, 4])
    folded[:, 3:] = 0
    return loss, losses, folded, moments


def _biased_deviation(loss, losses, table, moments):
    return (
        loss,
        losses,
        table * torch.tensor([126 / 125, 125 / 126, 1, 1, 1], device=table.device).view(1, 5, 1),
        moments,
    )


def _swapped_sides(loss, losses, table, moments):
    return loss, losses, table.flip(0), moments


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        (_loss_a_little_off, "odd_sizes"),
        (_means_folded, "large_mean"),
        (_biased_deviation, "odd_sizes"),
        (_swapped_sides, "large_mean"),
    ],
)
def test_the_net_catches_planted_bugs(monkeypatch, bug, name):
    right = op._FORWARD["reference"]
    with op._backend.use_backend("reference"):
        check(CASES[name])
        monkeypatch.setitem(op._FORWARD, "reference", lambda *given: bug(*right(*given)))
        with pytest.raises(AssertionError, match=r"errs by"):
            check(CASES[name])


def test_the_net_catches_a_cell_that_is_not_written(monkeypatch):
    right = op._BACKWARD["cpu"]

    def forgets_the_last(*given):
        gradients = right(*given)
        for gradient in gradients:
            poisoned = torch.empty_like(gradient)
            gradient.view(-1)[-1] = poisoned.view(-1)[-1]
        return gradients

    monkeypatch.setitem(op._BACKWARD, "reference", forgets_the_last)
    with op._backend.use_backend("reference"), pytest.raises(AssertionError, match="errs by nan"):
        check(PLAIN)
