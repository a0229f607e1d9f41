"""The compiled operators of the Pearson loss by themselves: contract and moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdkd import _ext
from jdkd.reference import pearson as reference
from tests.ops.pearson_cases import DTYPES, Case

SHAPES = ((2, 5, 40, 41), (1, 3, 70, 70), (2, 67, 3, 5), (1, 4, 1, 1))


@pytest.fixture(scope="module")
def compiled():
    if _ext.library() is None:
        pytest.skip(_ext.why_missing())
    return torch.ops.jdkd_C


def _levels(
    dtype: torch.dtype = torch.float32, channels_last: bool = False, **case
) -> tuple[list[Tensor], list[Tensor]]:
    students, teachers = Case(shapes=SHAPES, dtype=dtype, channels_last=channels_last, **case).levels()
    return [s.detach() for s in students], [t.detach() for t in teachers]


def _forward(compiled, students, teachers, weights=None, eps=1e-6, skip_constant=False):
    return compiled.pearson_fwd(students, teachers, weights or [1.0] * len(students), eps, skip_constant)


def _backward(compiled, dout):
    students, teachers = _levels()
    table = _forward(compiled, students, teachers)[2]
    return compiled.pearson_bwd(torch.tensor(1.0), students, teachers, table[0], dout(students))


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_moments_are_those_of_float64(compiled, dtype, channels_last, mean):
    students, teachers = _levels(dtype, channels_last, mean=mean)
    moments = _forward(compiled, students, teachers)[3]
    exact = reference.moments([s.double() for s in students], [t.double() for t in teachers])
    assert moments.dtype == torch.float64
    assert torch.equal(moments[0], exact[0])
    torch.testing.assert_close(moments[1:3], exact[1:3], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(moments[3:5], exact[3:5], rtol=1e-6, atol=1e-12)
    unit = (exact[3] * exact[4]).sqrt()
    assert ((moments[5] - exact[5]).abs() <= 1e-6 * unit).all()


def _nearly_constant_start(student: Tensor, teacher: Tensor) -> None:
    student[:, :, :13] = 1 + (student[:, :, :13] - 1) * 1e-6


def _constant_start(student: Tensor, teacher: Tensor) -> None:
    student[:, :, :13], teacher[:, :, :13] = 0.7, -300


def _far_first_value(student: Tensor, teacher: Tensor) -> None:
    student[:, :, 0, 0] = 1e4


def _another_scale(student: Tensor, teacher: Tensor) -> None:
    student[:, :, 40:] *= 1e3
    teacher[:, :, 70:] *= 1e4


def _moving_mean(student: Tensor, teacher: Tensor) -> None:
    student += torch.arange(student.shape[2])[:, None] * 10


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "change", [_nearly_constant_start, _constant_start, _far_first_value, _another_scale, _moving_mean]
)
def test_what_came_before_a_tile_may_mislead_its_guess(compiled, change, channels_last):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 3, 100, 101, generator=generator, dtype=torch.float64) + 1
    teacher = 0.7 * student + torch.randn(student.shape, generator=generator, dtype=torch.float64)
    change(student, teacher)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sides = [[side.float().contiguous(memory_format=layout)] for side in (student, teacher)]
    moments = _forward(compiled, *sides)[3]
    exact = reference.moments(*([side.double() for side in levels] for levels in sides))
    torch.testing.assert_close(moments[3:5], exact[3:5], rtol=1e-6, atol=0)
    assert ((moments[5] - exact[5]).abs() <= 1e-6 * (exact[3] * exact[4]).sqrt()).all()


def test_levels_are_weighted_one_by_one_and_add_up(compiled):
    students, teachers = _levels()
    weights = [1.0, 0.0, 2.5, -3.0]
    loss, losses, *_ = _forward(compiled, students, teachers, weights)
    plain = _forward(compiled, students, teachers)[1]
    torch.testing.assert_close(losses, plain * torch.tensor(weights))
    torch.testing.assert_close(loss, losses.sum())


@pytest.mark.parametrize("channels_last", [False, True])
def test_many_levels_are_those_of_one_level_each(compiled, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)

    def side() -> list[Tensor]:
        shapes = [(1 + i % 2, 3 + i % 5, 2 + i, 3) for i in range(37)]
        return [torch.randn(shape, generator=generator).contiguous(memory_format=layout) for shape in shapes]

    students, teachers, heads = side(), side(), side()
    loss, losses, table, moments = _forward(compiled, students, teachers)
    dx = compiled.pearson_bwd(torch.tensor(2.0), students, teachers, table[0], heads)
    parts = [_forward(compiled, [s], [t]) for s, t in zip(students, teachers, strict=True)]
    assert torch.equal(losses, torch.cat([part[1] for part in parts]))
    assert torch.equal(table, torch.cat([part[2] for part in parts], dim=2))
    assert torch.equal(moments, torch.cat([part[3] for part in parts], dim=1))
    torch.testing.assert_close(loss, losses.sum())
    for s, t, head, part, gradient in zip(students, teachers, heads, parts, dx, strict=True):
        alone = compiled.pearson_bwd(torch.tensor(2.0), [s], [t], part[2][0], [head])
        assert torch.equal(gradient, alone[0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_heads_is_added_before_the_one_rounding(compiled, dtype, channels_last):
    students, teachers = _levels(dtype, channels_last)
    heads = [s / 64 for s in students]  # far larger than the loss's gradient
    table = _forward(compiled, students, teachers, [1e3] * len(students))[2]
    dloss = torch.tensor(3.0)
    dx = compiled.pearson_bwd(dloss, students, teachers, table[0], heads)
    wide = [level.double() for level in students], [level.double() for level in teachers]
    exact = reference.pearson_bwd(dloss.double(), *wide, table[0].double(), [head.double() for head in heads])
    step = torch.finfo(dtype).eps
    for gradient, expected, level in zip(dx, exact, students, strict=True):
        assert gradient.stride() == level.stride()
        half_step = step / 2 * expected.abs() * 1.001 + 1e-6 * expected.abs().max()
        if dtype == torch.float16:
            half_step += 2**-25  # subnormal numbers
        assert ((gradient.double() - expected).abs() <= half_step).all()


@pytest.mark.parametrize(
    ("dout", "message"),
    [
        (lambda x: x[:2], r"2 tensors dout were given for 4 levels; give none, or one a level"),
        (lambda x: [*x[:3], x[0]], r"level of dout has shape \[2, 5, 40, 41\] .* x has shape \[1, 4, 1, 1\]"),
        (lambda x: [*x[:3], x[3].half()], r"dout of level 3 differs in dtype or device from x; convert it"),
        (
            lambda x: [x[0].contiguous(memory_format=torch.channels_last), *x[1:]],
            r"dout of level 0 is not dense in the layout of x, NCHW; copy it",
        ),
        (lambda x: [x[0][:, :1].expand_as(x[0]), *x[1:]], r"dout of level 0 is not dense"),
    ],
)
def test_heads_gradients_that_do_not_fit_are_refused(compiled, dout, message):
    with pytest.raises(RuntimeError, match=message):
        _backward(compiled, dout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dx: dx[:3], r"3 gradients were given for 4 levels; give one a level"),
        (lambda dx: [*dx[:3], dx[0]], r"a gradient has shape \[2, 5, 40, 41\] and its level has shape \[1, 4, 1, 1\]"),
        (lambda dx: [dx[0].half(), *dx[1:]], r"the gradient of level 0 differs from it in dtype, device or layout"),
        (
            lambda dx: [dx[0].contiguous(memory_format=torch.channels_last), *dx[1:]],
            r"the gradient of level 0 differs from it in dtype",
        ),
    ],
)
def test_memory_that_no_gradient_fits_is_refused(compiled, change, message):
    students, teachers = _levels()
    table = _forward(compiled, students, teachers)[2]
    with pytest.raises(RuntimeError, match=message):
        compiled.pearson_bwd_into(torch.tensor(1.0), students, teachers, table[0], [], change(students))


def test_as_many_weights_as_levels_are_wanted(compiled):
    students, teachers = _levels()
    with pytest.raises(RuntimeError, match=r"3 weights were given for 4 levels; give one a level"):
        _forward(compiled, students, teachers, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_constant_channel_is_skipped_on_request_and_a_nan_never(compiled, channels_last):
    students, teachers = _levels(channels_last=channels_last)
    students[0][:, 1], teachers[1][:, 2] = 0.7, 0.0
    loss, _, table, _ = _forward(compiled, students, teachers, skip_constant=True)
    dead = (table[:, :3] == 0).all(dim=(0, 1)).nonzero().flatten().tolist()
    assert dead == [1, 5 + 2, *range(75, 79)]  # the last level has single elements
    assert loss.isfinite()
    teachers[0][0, 1, 2, 3] = float("nan")
    assert _forward(compiled, students, teachers, skip_constant=True)[0].isnan()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(compiled, dtype, channels_last):
    shapes = ((2, 37, 60, 60), (2, 19, 31, 33))
    sides = Case(shapes=shapes, dtype=dtype, channels_last=channels_last).levels()
    students, teachers = ([level.detach() for level in side] for side in sides)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            forward = _forward(compiled, students, teachers)
            dx = compiled.pearson_bwd(torch.tensor(2.0), students, teachers, forward[2][0], students)
            results.append([*forward, *dx])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
