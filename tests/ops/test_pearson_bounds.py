"""The bound that holds a half-precision gradient: a right kernel passes, a planted wrong one does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.pearson_cases import assert_as_exact_as_eager, eager

CHANNELS = 4
LIKE_256 = CHANNELS / 256  # the gradient of a channel is over their number: so small are those of a detector
SHAPES = [(2, CHANNELS, 50, 84), (2, CHANNELS, 7, 11)]  # P4 and P7


def levels(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(shape, generator=generator) + 3 for shape in SHAPES]
    teachers = [0.7 * level + torch.randn(level.shape, generator=generator) for level in students]
    return [level.to(dtype) for level in students], [level.to(dtype) for level in teachers]


def checked(dtype: torch.dtype, upstream: float, change=lambda dx: dx) -> None:
    """Holds the float64 gradient, changed and rounded once, to the bound."""
    students, teachers = levels(dtype)
    loss, *gradients = eager(students, teachers, torch.float64, upstream)
    own = [change(dx).to(dtype) for dx in gradients[: len(students)]]
    assert_as_exact_as_eager(loss.float(), own, students, teachers, upstream)


dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@dtypes
@pytest.mark.parametrize("upstream", [LIKE_256, 2.0**16 * LIKE_256], ids=["unscaled", "loss-scale"])
def test_the_exact_gradient_rounded_once_passes(dtype, upstream):
    checked(dtype, upstream)


@dtypes
@pytest.mark.parametrize(
    "wrong",
    [
        lambda dx: dx * 1.01,
        lambda dx: dx + dx.std() / 20,  # a mean that was not taken off
        lambda dx: torch.where(torch.arange(dx.shape[3]) == 3, 0.0, dx),  # a column that no thread wrote
        lambda dx: dx.roll(1, 3),
    ],
    ids=["scale", "mean", "column", "shifted"],
)
def test_a_planted_error_fails_under_a_loss_scale(dtype, wrong):
    with pytest.raises(AssertionError, match="gradient 0 errs by"):
        checked(dtype, 2.0**16 * LIKE_256, wrong)


@pytest.mark.parametrize("wrong", [lambda dx: dx * 0, lambda dx: dx.roll(1, 3)], ids=["zero", "shifted"])
def test_a_planted_error_fails_where_float16_rounds_most(wrong):
    with pytest.raises(AssertionError, match="gradient 0 errs by"):
        checked(torch.float16, LIKE_256, wrong)


def test_no_bound_relative_to_the_norm_can_hold_unscaled_float16_gradients():
    """Rounding alone, to subnormal numbers, is further off than a wrong kernel may be elsewhere."""
    students, teachers = levels(torch.float16)
    dx = eager(students, teachers, torch.float64, LIKE_256 / 4)[1]  # of P3
    assert (dx.half().double() - dx).norm() > 2**-6 * dx.norm()
