"""Invariances of the Pearson loss, on inputs that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jdkd._backend import use_backend
from jdkd.functional import pkd_loss
from jdkd.reference import pearson as reference

BACKENDS = ("cpu", "reference")
shapes = st.tuples(*(st.integers(1, top) for top in (3, 37, 9, 23))).filter(lambda s: s[0] * s[2] * s[3] > 1)
seeds = st.integers(0, 2**31 - 1)
layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])
scales = st.floats(1e-2, 1e3)


def pair(shape: tuple[int, ...], seed: int, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Student and teacher ``[N, C, H, W]``, half correlated."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    student = noise[0].contiguous(memory_format=layout)
    return student.requires_grad_(), (noise[0] + noise[1]).contiguous(memory_format=layout)


def loss_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    loss = pkd_loss(student, teacher)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40)
@given(shapes, seeds, layouts)
def test_any_shape_gives_the_numbers_of_the_formula(name, shape, seed, layout):
    student, teacher = pair(shape, seed, layout)
    with use_backend(name):
        loss, gradient = loss_and_gradient(student, teacher)
    wide = student.detach().double().requires_grad_()
    exact = reference.pkd_loss([wide], [teacher.double()])
    (exact_gradient,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    n, c, h, w = shape
    spread = wide.detach().transpose(0, 1).flatten(1).std(1)
    unit = 5 / (c * n * h * w * (spread + 1e-6)).view(c, 1, 1)  # a gradient's two terms are this large at most
    assert ((gradient - exact_gradient) / unit).abs().max() < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(shapes, seeds, layouts, scales, st.floats(-100, 100))
def test_scale_and_offset_of_the_teacher_do_not_matter(name, shape, seed, layout, scale, offset):
    student, teacher = pair(shape, seed, layout)
    with use_backend(name):
        loss, _ = loss_and_gradient(student, teacher)
        moved, _ = loss_and_gradient(student, teacher * scale + offset)
    # What float32 rounding of the moved teacher does, and what 1e-6 beside its deviation does.
    torch.testing.assert_close(moved, loss, rtol=1e-3, atol=1e-3 + 3e-7 * abs(offset) / scale)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(shapes, seeds, layouts)
def test_the_order_of_channels_and_images_does_not_matter(name, shape, seed, layout):
    student, teacher = pair(shape, seed, layout)
    order = torch.Generator().manual_seed(seed)
    channels, images = torch.randperm(shape[1], generator=order), torch.randperm(shape[0], generator=order)

    def shuffled(level: Tensor) -> Tensor:
        return level.detach()[images][:, channels].contiguous(memory_format=layout)

    with use_backend(name):
        loss, gradient = loss_and_gradient(student, teacher)
        other, other_gradient = loss_and_gradient(shuffled(student).requires_grad_(), shuffled(teacher))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    unit = 5 / (gradient.numel() * student.detach().transpose(0, 1).flatten(1).std(1).min().item())
    torch.testing.assert_close(other_gradient, shuffled(gradient), rtol=0, atol=1e-6 * unit)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(shapes, seeds, layouts)
def test_the_gradient_neither_shifts_nor_scales_the_student(name, shape, seed, layout):
    student, teacher = pair(shape, seed, layout)
    with use_backend(name):
        _, gradient = loss_and_gradient(student, teacher)
    flat = gradient.double().transpose(0, 1).flatten(1)  # [C, NHW]
    normal = reference.normalize(student.detach().double()).transpose(0, 1).flatten(1)
    unit = flat.abs().sum(1) + 1 / (flat.numel() * student.detach().transpose(0, 1).flatten(1).std(1).double())
    assert (flat.sum(1).abs() / unit).max() < 1e-5
    assert ((flat * normal).sum(1).abs() / unit).max() < 1e-4


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=15)
@given(shapes, seeds)
def test_the_loss_lies_between_its_bounds(name, shape, seed):
    student, teacher = pair(shape, seed, torch.contiguous_format)
    with use_backend(name):
        assert 0 <= pkd_loss(student, teacher) <= 2
        assert pkd_loss(student, student.detach()) < 1e-8
        assert pkd_loss(student, -student.detach()) <= 2 + 1e-6
