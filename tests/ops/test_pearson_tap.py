"""The tap of the Pearson loss: features that go on to the heads, and one backward pass for both gradients."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.notices import Notice
from tests.ops.pearson_cases import DTYPES, PLAIN, Case

OP = "pearson"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning"),  # by dynamo
]
SHAPES = ((2, 4, 6, 5), (2, 4, 3, 3), (2, 4, 1, 1))


def drawn(seed: int, *, grad: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad) for shape in SHAPES]


def head(features: list[Tensor]) -> Tensor:
    """Something that uses every feature, twice, and not linearly."""
    return sum((level.float().sin() * level.float()).sum() for level in features)


def separately(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """The gradients without a tap."""
    return list(torch.autograd.grad(head(students) + pkd_loss(students, teachers, 6.0), students))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_heads_and_loss_arrive_together(backend, device, channels_last):
    students, teachers = drawn(0, grad=True, device=device), drawn(1, device=device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    students = [s.detach().contiguous(memory_format=layout).requires_grad_() for s in students]
    features, loss = pearson_tap(students, teachers, 6.0)
    assert torch.equal(loss, pkd_loss(students, teachers, 6.0))
    assert [f.data_ptr() for f in features] == [s.data_ptr() for s in students]
    found = torch.autograd.grad(head(features) + loss, students)
    assert_close(found, separately(students, teachers))


@pytest.mark.parametrize("scales", [(2.0, 3.0), (1.0, 0.0), (65536.0, 1.0)])
def test_a_retained_graph_scales_once_each_time(backend, device, scales):
    students, teachers = drawn(0, grad=True, device=device), drawn(1, device=device)
    features, loss = pearson_tap(students, teachers, 6.0)
    total, once = head(features) + loss, separately(students, teachers)
    for scale in scales:
        found = torch.autograd.grad(total, students, torch.full_like(total, scale), retain_graph=True)
        for a, b in zip(found, once, strict=True):
            torch.testing.assert_close(a, scale * b, rtol=1e-5, atol=1e-6 * scale)


def test_gradients_accumulate_over_batches(backend, device):
    students = drawn(0, grad=True, device=device)
    expected = [torch.zeros_like(s) for s in students]
    for seed in (1, 2):
        teachers = drawn(seed, device=device)
        features, loss = pearson_tap(students, teachers, 6.0)
        (head(features) + loss).backward()
        expected = [a + b for a, b in zip(expected, separately(students, teachers), strict=True)]
    assert_close([s.grad for s in students], expected)


def test_the_loss_alone_and_the_heads_alone(backend, device):
    students, teachers = drawn(0, grad=True, device=device), drawn(1, device=device)
    features, loss = pearson_tap(students, teachers, 6.0)
    only_loss = torch.autograd.grad(loss, students, retain_graph=True)
    assert_close(list(only_loss), list(torch.autograd.grad(pkd_loss(students, teachers, 6.0), students)))
    only_heads = torch.autograd.grad(head(features), students)
    assert all(
        torch.equal(a, b) for a, b in zip(only_heads, torch.autograd.grad(head(students), students), strict=True)
    )


@pytest.mark.parametrize("used", [[0], [2], [0, 2]])
def test_levels_that_feed_no_head_get_the_gradient_of_the_loss(backend, device, used):
    students, teachers = drawn(0, grad=True, device=device), drawn(1, device=device)
    features, loss = pearson_tap(students, teachers, 6.0)
    found = torch.autograd.grad(head([features[i] for i in used]) + loss, students)
    expected = torch.autograd.grad(head([students[i] for i in used]) + pkd_loss(students, teachers, 6.0), students)
    assert_close(list(found), list(expected))


def test_a_feature_may_be_tapped_by_two_teachers():
    students = drawn(0, grad=True)
    features, first = pearson_tap(students, drawn(1), 6.0)
    features, second = pearson_tap(features, drawn(2), 2.0)
    found = torch.autograd.grad(head(features) + first + second, students)
    total = head(students) + pkd_loss(students, drawn(1), 6.0) + pkd_loss(students, drawn(2), 2.0)
    assert_close(list(found), list(torch.autograd.grad(total, students)))


def test_one_level_may_stand_twice():
    (student, *_), (teacher, *_), (other, *_) = drawn(0, grad=True), drawn(1), drawn(2)
    (a, b), loss = pearson_tap([student, student], [teacher, other])
    (found,) = torch.autograd.grad(head([a]) + 2 * head([b]) + loss, student)
    total = 3 * head([student]) + pkd_loss(student, teacher) + pkd_loss(student, other)
    assert_close([found], list(torch.autograd.grad(total, student)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_loss(backend, device, mode):
    students, teachers = drawn(0, grad=True, device=device), drawn(1, device=device)
    with mode():
        features, loss = pearson_tap(students, teachers, 6.0)
    assert not loss.requires_grad
    assert torch.equal(loss, pkd_loss(students, teachers, 6.0))
    assert all(a is b for a, b in zip(features, students, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_survives_checkpointing(reentrant):
    students, teachers = drawn(0, grad=True), drawn(1)

    def block(*levels: Tensor) -> Tensor:
        features, loss = pearson_tap([level * 1.5 for level in levels], teachers, 6.0)
        return head(features) + loss

    found = torch.autograd.grad(block(*students), students)
    checkpoint(block, *students, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, s.grad) for a, s in zip(found, students, strict=True))


def test_is_exact_under_a_gradient_scaler():
    parameter = torch.nn.Parameter(torch.tensor([1.5, -0.5]))
    expected = torch.nn.Parameter(parameter.detach().clone())
    (base, *_), (teacher, *_) = drawn(0), drawn(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for weights, scaled in ((parameter, True), (expected, False)):
        optimizer = torch.optim.SGD([weights], 0.1)
        feature = base * weights[0] + base.relu() * weights[1]
        feature, loss = pearson_tap(feature, teacher, 6.0)
        total = head([feature]) + loss
        if scaled:
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            total.backward()
            optimizer.step()
    torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0)


def test_a_second_derivative_is_refused():
    students, teachers = drawn(0, grad=True), drawn(1)
    features, loss = pearson_tap(students, teachers)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(head(features) + loss, students, create_graph=True)


def test_writing_to_the_features_is_refused():
    students, teachers = drawn(0, grad=True), drawn(1)
    students = [student + 0 for student in students]
    features, _ = pearson_tap(students, teachers)
    for write in (lambda x: x.relu_(), lambda x: x.add_(1), lambda x: x[:, 0].zero_()):
        with pytest.raises(RuntimeError, match="modified inplace"):
            write(features[0])


def test_writing_to_the_students_afterwards_is_noticed():
    students, teachers = [student + 0 for student in drawn(0, grad=True)], drawn(1)
    features, loss = pearson_tap(students, teachers)
    with torch.no_grad():
        students[0].add_(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        (head(features) + loss).backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_heads_come_as_autograd_makes_them(backend, device, dtype):
    """Expanded from one number, in another layout, and from a head that ran in another dtype."""
    students, teachers = drawn(0, grad=True, dtype=dtype, device=device), drawn(1, dtype=dtype, device=device)
    of_loss = torch.autograd.grad(pkd_loss(students, teachers, 6.0), students)
    for use in (
        lambda level: level.sum(),
        lambda level: level.permute(0, 2, 3, 1).contiguous().square().sum(),
        lambda level: level.double().mul(0.3).sum(),
        lambda level: (level.contiguous(memory_format=torch.channels_last) * 2).flatten(1)[:, ::2].sum(),
    ):
        features, loss = pearson_tap(students, teachers, 6.0)
        found = torch.autograd.grad(sum(map(use, features)).float() + loss, students)
        expected = [
            a.float() + b.float()
            for a, b in zip(torch.autograd.grad(sum(map(use, students)), students), of_loss, strict=True)
        ]
        for a, b in zip(found, expected, strict=True):
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
            torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_a_head_under_autocast():
    student, teacher = drawn(0, grad=True)[0], drawn(1)[0]
    conv = torch.nn.Conv2d(4, 2, 3, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feature, loss = pearson_tap(conv(student) @ torch.eye(5), (teacher[:, :2]).float(), 6.0)
        total = conv.weight.sum() + feature.float().square().sum() + loss
    total.backward()
    assert feature.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert student.grad.isfinite().all() and student.grad.any()


def test_a_teacher_that_wants_a_gradient_gets_it(backend, device):
    students, teachers = drawn(0, grad=True, device=device), drawn(1, grad=True, device=device)
    features, loss = pearson_tap(students, teachers, 6.0)
    found = torch.autograd.grad(head(features) + loss, teachers)
    assert_close(list(found), list(torch.autograd.grad(pkd_loss(students, teachers, 6.0), teachers)))
    features, loss = pearson_tap([s.detach() for s in students], teachers, 6.0)
    assert_close(list(torch.autograd.grad(loss, teachers)), list(found))


def test_teachers_made_under_inference_mode_are_taken():
    with torch.inference_mode():
        teachers = drawn(1)
    students = drawn(0, grad=True)
    features, loss = pearson_tap(students, teachers, 6.0)
    assert_close(list(torch.autograd.grad(head(features) + loss, students)), separately(students, drawn(1)))


def test_nothing_is_kept_but_the_features_and_a_table():
    students, teachers = drawn(0, grad=True), drawn(1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pearson_tap(students, teachers, 6.0)
    given = {level.data_ptr() for level in (*students, *teachers)}
    (table,) = [x for x in kept if x.data_ptr() not in given]
    assert table.shape == (2, 5, 12)


def test_students_come_back_as_they_came():
    students, teachers = drawn(0, grad=True), drawn(1)
    named = OrderedDict(zip("abc", students, strict=True))
    features, loss = pearson_tap(named, OrderedDict(zip("abc", teachers, strict=True)))
    assert type(features) is OrderedDict and list(features) == ["a", "b", "c"]
    (feature, own) = pearson_tap(students[0], teachers[0])
    assert isinstance(feature, Tensor) and torch.equal(feature, students[0])
    as_list, same = pearson_tap((s for s in students), tuple(teachers))
    assert isinstance(as_list, list) and torch.equal(loss, same) and own < loss


def test_levels_without_a_partner_pass_untouched():
    students, teachers = drawn(0, grad=True), drawn(1)
    with pytest.warns(Notice, match="leaves out the student's levels of sizes 6x5, 1x1"):
        features, loss = pearson_tap(students, teachers[1:2], pairing="stride")
    assert features[0] is students[0] and features[2] is students[2] and features[1] is not students[1]
    assert torch.equal(loss, pkd_loss(students[1], teachers[1]))


def test_a_teacher_of_another_size_is_resized():
    (student, *_), (teacher, *_) = drawn(0, grad=True), drawn(1)
    teacher = torch.nn.functional.interpolate(teacher, (12, 10))
    feature, loss = pearson_tap(student, teacher, 6.0)
    assert feature.shape == student.shape
    assert torch.equal(loss, pkd_loss(student, teacher, 6.0, resize_stu=False))


def test_a_float64_teacher_leaves_the_features_their_dtype():
    students, teachers = drawn(0, grad=True), [level.double() for level in drawn(1)]
    features, loss = pearson_tap(students, teachers, 6.0)
    assert loss.dtype == torch.float64 and {level.dtype for level in features} == {torch.float32}
    found = torch.autograd.grad(head(features) + loss, students)
    assert_close(list(found), separately(students, drawn(1)))


def test_what_does_not_pair_is_refused_before_anything_runs():
    with pytest.raises(InputError, match="student has 3 levels and teacher has 2"):
        pearson_tap(drawn(0), drawn(1)[:2])


@pytest.mark.parametrize(("name", "dynamic"), [("cpu", True), ("reference", False)])
def test_compiles_as_one_graph(name, dynamic):
    def step(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        features, loss = pearson_tap([s * 1.5 for s in students], teachers, 6.0)
        return head(features) + 2 * loss

    torch.compiler.reset()
    with use_backend(name):
        for case in (PLAIN, replace(PLAIN, channels_last=True), Case(shapes=((2, 3, 7, 5), (1, 2, 4, 1)))):
            students, teachers = case.levels()
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            gradients = [torch.autograd.grad(run(students, teachers), students) for run in (compiled, step)]
            assert_close(list(gradients[0]), list(gradients[1]))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_pyramid_by_names_compiles_as_one_graph(kind):
    def step(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        named = kind((f"p{place}", level) for place, level in enumerate(students))
        features, loss = pearson_tap(named, teachers, 6.0)
        return head(list(features.values())) + loss

    torch.compiler.reset()
    students, teachers = PLAIN.levels()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(run(students, teachers), students) for run in (compiled, step)]
    assert_close(list(gradients[0]), list(gradients[1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by inductor
def test_inductor_keeps_the_tap():
    def step(student: Tensor, teacher: Tensor) -> Tensor:
        feature, loss = pearson_tap(student.relu(), teacher, 6.0)
        return feature.square().sum() + loss

    torch.compiler.reset()
    (student, *_), (teacher, *_) = drawn(0, grad=True), drawn(1)
    with use_backend("cpu"):
        gradients = [torch.autograd.grad(run(student, teacher), student) for run in (torch.compile(step), step)]
    assert_close(list(gradients[0]), list(gradients[1]))
