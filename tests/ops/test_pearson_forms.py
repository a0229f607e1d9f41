"""Which form of the Pearson loss is chosen, and what autograd does with a gradient that the forward has computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jdkd import _ext
from jdkd._backend import use_backend
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.ops import pearson_forms, pearson_single
from jdkd.ops.pearson_forms import LossCall, select
from tests.ops.pearson_cases import CASES, PLAIN, Case, check
from tests.tuned import tuned

needs_library = pytest.mark.skipif(_ext.library() is None, reason="jdkd._C is not built")
LEVELS = [torch.zeros(1, 2, 3, 3)]


@pytest.fixture
def roomy(monkeypatch):
    """A device on which everything fits."""
    monkeypatch.setattr(pearson_single, "fits", lambda students, teachers: True)


@pytest.fixture
def in_one_pass(monkeypatch) -> list[str]:
    """The single pass wherever its rule would take it on a GPU, computed by its reference; a log of its operators."""
    calls: list[str] = []
    monkeypatch.setattr(
        pearson_forms,
        "select",
        lambda call: "single pass" if call.gradients == "students" and not call.tap else select(call),
    )
    for name, table in (("single", pearson_single._SINGLE), ("scale", pearson_single._SCALE)):
        right = table["reference"]
        monkeypatch.setitem(
            table, "reference", lambda *given, name=name, right=right: calls.append(name) or right(*given)
        )
    with use_backend("reference"):
        yield calls


@pytest.mark.parametrize(
    ("call", "form"),
    [
        (LossCall(LEVELS, LEVELS), "split"),
        (LossCall(LEVELS, LEVELS, "students"), "single pass"),
        (LossCall(LEVELS, LEVELS, "teachers"), "split"),
        (LossCall(LEVELS, LEVELS, "students", instance=True), "split"),
        (LossCall(LEVELS, LEVELS, "students", tap=True), "tap"),
        (LossCall(LEVELS, LEVELS, "students", masked=True), "moments"),
        (LossCall(LEVELS, LEVELS, "students", tap=True, grouped=True), "moments"),
    ],
)
def test_every_call_has_its_form(roomy, call, form):
    with use_backend("cuda"):
        assert select(call) == form


def test_the_single_pass_waits_until_it_is_asked_for(roomy, monkeypatch):
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    call = LossCall(LEVELS, LEVELS, "students")
    assert select(call) == "split"
    monkeypatch.setenv("JDKD_BACKEND", "cuda")
    assert select(call) == "single pass"
    with use_backend("triton"):
        assert select(call) == "split"


def test_what_is_not_on_the_chip_is_split():
    with use_backend("cuda"):
        assert select(LossCall(LEVELS, LEVELS, "students")) == "split"


def gradients(students: list[Tensor], loss: Tensor, scale: float, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, students, torch.full_like(loss, scale), **options))


@pytest.mark.parametrize("name", ["odd_sizes", "large_mean", "one_element_and_1x1"])
def test_the_gradient_of_the_forward_obeys_the_2x_rule(in_one_pass, name):
    students, teachers = CASES[name].levels()
    check(CASES[name])  # both sides want a gradient, so this is the split form
    assert not in_one_pass
    teachers = [teacher.detach() for teacher in teachers]
    loss = pkd_loss(students, teachers, 6.0)
    assert in_one_pass == ["single"]
    found = gradients(students, loss, 3.0)
    expected = torch.autograd.grad(3 * pkd_loss(students, [t.requires_grad_() for t in teachers], 6.0), students)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item())


@pytest.mark.parametrize("scales", [(2.0, 3.0), (3.0, 1.0), (1.0, 2.0), (0.0, 1.0), (2.0, 0.0)])
def test_a_retained_graph_never_scales_twice(in_one_pass, scales):
    students, teachers = PLAIN.levels()
    teachers = [teacher.detach() for teacher in teachers]
    unit = gradients(students, pkd_loss(students, teachers, 6.0), 1.0)
    loss = pkd_loss(students, teachers, 6.0)
    first = gradients(students, loss, scales[0], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = gradients(students, loss, scales[1])
    for a, b, c, d in zip(first, kept, second, unit, strict=True):
        assert torch.equal(a, b)  # what was handed out is not touched again
        torch.testing.assert_close(a, scales[0] * d, rtol=1e-6, atol=0)
        torch.testing.assert_close(c, scales[1] * d, rtol=1e-6, atol=1e-7 * d.abs().max().item())
    assert in_one_pass == ["single", "scale", "single", "scale"]  # the last backward computed its gradient anew


def test_gradients_accumulate(in_one_pass):
    students, teachers = PLAIN.levels()
    teachers = [teacher.detach() for teacher in teachers]
    loss = pkd_loss(students, teachers, 6.0)
    loss.backward(retain_graph=True)
    once = [student.grad.clone() for student in students]
    loss.backward(torch.tensor(2.0))
    for student, gradient in zip(students, once, strict=True):
        torch.testing.assert_close(student.grad, 3 * gradient, rtol=1e-5, atol=1e-7 * gradient.abs().max().item())


def test_a_gradient_scaler_is_exact(in_one_pass):
    students, teachers = PLAIN.levels()
    teachers = [teacher.detach() for teacher in teachers]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(pkd_loss(students, teachers, 6.0)).backward()
    expected = gradients(students, pkd_loss(students, teachers, 6.0), 1.0)
    assert all(torch.equal(s.grad, 2.0**16 * e) for s, e in zip(students, expected, strict=True))


def test_only_the_students_that_ask_get_a_gradient(in_one_pass):
    students, teachers = PLAIN.levels()
    students[1].requires_grad_(False)
    pkd_loss(students, [teacher.detach() for teacher in teachers]).backward()
    assert students[0].grad is not None and students[1].grad is None


def test_a_graph_that_is_not_used_costs_no_second_gradient(in_one_pass):
    students, teachers = PLAIN.levels()
    pkd_loss(students, [teacher.detach() for teacher in teachers])
    features, loss = pearson_tap(students, [teacher.detach() for teacher in teachers])
    (loss + features[0].sum()).backward()
    assert in_one_pass == ["single"]


def test_half_precision_never_goes_in_one_pass():
    assert torch.float16 not in pearson_single._DTYPES
    students, teachers = replace(PLAIN, dtype=torch.float16).levels()
    assert not pearson_single.fits(students, teachers)


@needs_library
def test_on_a_cpu_channels_go_in_one_pass_that_a_cache_holds_and_that_threads_can_share():
    def fits(shape=(2, 64, 32, 32), teacher=torch.float32, layout=torch.contiguous_format):
        student, other = (torch.empty(shape, dtype=dtype) for dtype in (torch.float32, teacher))
        return pearson_single.fits([student.contiguous(memory_format=layout)], [other])

    assert fits()
    assert not fits((2, 64, 1024, 1024)) and not fits(layout=torch.channels_last) and not fits(teacher=torch.bfloat16)
    assert not fits((2, torch.get_num_threads() - 1, 32, 32))
    with use_backend("cpu"):
        assert not fits()


@needs_library
@pytest.mark.parametrize("dtype", pearson_single._DTYPES, ids=str)
@pytest.mark.parametrize("skip_constant", [False, True])
def test_on_a_cpu_one_pass_gives_the_bits_of_two(dtype, skip_constant):
    case = Case(((3, 8, 150, 151), (1, 9, 1, 1), (2, 5, 37, 3)), dtype=dtype, change=lambda level: level[:, 0].zero_())
    students, teachers = case.levels()
    teachers = [teacher.detach() for teacher in teachers]
    how = {"zero_variance": "skip" if skip_constant else "keep", "return_levels": True}

    def both_ways(scale: float) -> list[Tensor]:
        loss, losses = pkd_loss(students, teachers, 6.0, **how)
        return [loss, losses, *gradients(students, loss, scale)]

    region = pearson_forms.TABLE.region(LossCall(students, teachers, "students"))
    expected = [*both_ways(1.0), *both_ways(0.5)]
    with tuned(pearson_forms.NAME, **{region: "single pass"}):
        assert pearson_forms.select(LossCall(students, teachers, "students")) == "single pass"
        found = [*both_ways(1.0), *both_ways(0.5)]
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
