"""What the Pearson loss accepts and refuses, and how it behaves under autograd, the compiler and the dispatcher."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from jdkd import _backend
from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from jdkd.ops import pearson as op
from jdkd.reference import pearson as reference
from tests.ops.pearson_cases import PLAIN, Case, check

OP = "pearson"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning"),  # by dynamo
]


def drawn(*shapes: tuple[int, ...], seed: int = 0, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


SHAPES = ((2, 4, 6, 5), (2, 4, 3, 3))


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda x: OrderedDict(enumerate(x)), lambda x: (y for y in x)])
def test_takes_any_iterable_of_levels(wrap):
    students, teachers = drawn(*SHAPES), drawn(*SHAPES, seed=1)
    expected = pkd_loss(students, teachers, 6.0)
    assert torch.equal(pkd_loss(wrap(students), wrap(teachers), 6.0), expected)
    if isinstance(wrapped := wrap(students), OrderedDict):
        assert torch.equal(pkd_loss(wrapped.values(), teachers, 6.0), expected)


def test_takes_a_bare_tensor():
    (student,), (teacher,) = drawn(SHAPES[0]), drawn(SHAPES[0], seed=1)
    assert torch.equal(pkd_loss(student, teacher), pkd_loss([student], [teacher]))


def test_levels_are_summed_and_weighted():
    students, teachers = drawn(*SHAPES), drawn(*SHAPES, seed=1)
    parts = [pkd_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(pkd_loss(students, teachers, 6.0), 6 * sum(parts))


@pytest.mark.parametrize("resize_stu", [True, False])
@pytest.mark.parametrize("size", [(12, 10), (6, 9), (3, 5)])
def test_levels_of_different_size_are_resized_and_only_those(backend, resize_stu, size):
    if backend == "triton" and (resize_stu, size) != (True, (12, 10)):
        pytest.skip("they are resized before a kernel has them, and the interpreter is slow")
    students = drawn((2, 3, 6, 5), (2, 3, 4, 4), grad=True)
    teachers = drawn((2, 3, *size), (2, 3, 4, 4), seed=1)
    loss = pkd_loss(students, teachers, 6.0, resize_stu)
    gradients = torch.autograd.grad(loss, students)
    expected = reference.pkd_loss(students, teachers, 6.0, resize_stu)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, students), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(1, 2, 3, 3)] * 2, [(1, 2, 3, 3)] * 3, "student has 2 levels and teacher has 3"),
        ([], [], "no levels"),
        ([(1, 2, 3, 3)], [(1, 4, 3, 3)], "level 0: student has 2 channels and teacher has 4"),
        ([(1, 2, 3, 3)] * 2, [(1, 2, 3, 3), (3, 2, 3, 3)], "level 1: student has 1 images and teacher has 3"),
        ([(2, 3, 3)], [(2, 3, 3)], r"student level 0 has shape \(2, 3, 3\)"),
        ([(1, 2, 3, 3)], [(1, 2, 0, 3)], r"teacher level 0 has shape \(1, 2, 0, 3\)"),
    ],
)
def test_levels_that_do_not_pair_are_refused_in_one_sentence(student, teacher, message):
    with pytest.raises(InputError, match=message):
        pkd_loss(drawn(*student), drawn(*teacher))


def test_what_is_no_floating_tensor_is_refused():
    (level,) = drawn((1, 2, 3, 3))
    with pytest.raises(InputError, match=r"dtype torch\.int64"):
        pkd_loss(level.long(), level)
    with pytest.raises(InputError, match="teacher level 0 is a ndarray"):
        pkd_loss([level], [level.numpy()])
    with pytest.raises(InputError, match="student is on cpu and teacher on meta"):
        pkd_loss(level, level.to("meta"))


def test_strided_levels_give_the_same_numbers(backend, device):
    (wide,), (teacher,) = drawn((2, 6, 8, 14)), drawn((2, 6, 4, 7), seed=1)
    view = wide.to(device)[:, :, ::2, ::2].requires_grad_()  # no layout that a kernel takes
    assert not view.is_contiguous()
    plain = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    losses = [pkd_loss(level, teacher.to(device)) for level in (view, plain)]
    assert torch.equal(*losses)
    assert torch.equal(torch.autograd.grad(losses[0], view)[0], torch.autograd.grad(losses[1], plain)[0])


def test_no_copy_is_made_of_channels_last_levels(monkeypatch):
    students, teachers = Case(channels_last=True).levels()
    seen = []

    def spy(students: list[Tensor], teachers: list[Tensor], *settings) -> op.Forward:
        seen.extend(level.data_ptr() for level in (*students, *teachers))
        return reference.pearson_fwd(students, teachers, *settings)

    monkeypatch.setitem(op._FORWARD, "cpu", spy)
    with use_backend("cpu"):
        pkd_loss(students, teachers)
    assert seen == [level.data_ptr() for level in (*students, *teachers)]


def test_gradients_go_where_they_are_wanted():
    for wants in itertools.product([False, True], repeat=4):
        levels = [level.requires_grad_(want) for level, want in zip(drawn(*SHAPES, *SHAPES), wants, strict=True)]
        loss = pkd_loss(levels[:2], [level + 0 for level in levels[2:]])
        assert loss.requires_grad == any(wants)
        if any(wants):
            loss.backward()
        assert [level.grad is not None for level in levels] == list(wants)


def test_teachers_made_under_inference_mode_are_taken():
    students = drawn(*SHAPES, grad=True)
    with torch.inference_mode():
        teachers = drawn(*SHAPES, seed=1)
    expected = torch.autograd.grad(pkd_loss(students, drawn(*SHAPES, seed=1)), students)
    found = torch.autograd.grad(pkd_loss(students, teachers), students)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_feature_changed_in_place_is_noticed():
    students, teachers = drawn(*SHAPES, grad=True), drawn(*SHAPES, seed=1)
    loss = pkd_loss(students, teachers)
    teachers[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused():
    students, teachers = drawn(*SHAPES, grad=True), drawn(*SHAPES, seed=1)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(pkd_loss(students, teachers), students, create_graph=True)


def test_the_graph_can_be_used_twice(backend, device):
    students, teachers = PLAIN.levels(device)
    loss = pkd_loss(students, teachers)
    first = torch.autograd.grad(loss, students, torch.tensor(2.0, device=device), retain_graph=True)
    second = torch.autograd.grad(loss, students, torch.tensor(4.0, device=device))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_a_zero_upstream_gives_zeros(backend, device):
    students, teachers = PLAIN.levels(device)
    gradients = torch.autograd.grad(pkd_loss(students, teachers), students, torch.zeros((), device=device))
    assert not any(gradient.any() for gradient in gradients)


def test_a_backward_may_run_on_another_backend():
    students, teachers = PLAIN.levels()
    expected = torch.autograd.grad(pkd_loss(students, teachers), students)
    for forward, backward in itertools.permutations(("reference", "cpu", "triton"), 2):
        with use_backend(forward):
            loss = pkd_loss(students, teachers)
        with use_backend(backward):
            found = torch.autograd.grad(loss, students)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "channels_last"), [("cpu", True), ("reference", False)])
def test_the_operators_pass_opcheck(name, channels_last):
    students, teachers = ([level.detach() for level in side] for side in Case(channels_last=channels_last).levels())
    with use_backend(name):
        given = (students, teachers, [6.0] * len(students), 1e-6, False)
        loss, _, table, _ = torch.ops.jdkd.pearson_fwd(*given)
        torch.library.opcheck(torch.ops.jdkd.pearson_fwd.default, given)
        for dout in ([], students):
            torch.library.opcheck(torch.ops.jdkd.pearson_bwd.default, (loss, students, teachers, table[0], dout))


@pytest.mark.parametrize(("name", "dtype"), [("cpu", torch.float32), ("reference", torch.bfloat16)])
def test_compiles_as_one_graph(name, dtype):
    def step(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        return 2 * pkd_loss([s * 1.5 for s in students], (t for t in teachers), 6.0)

    for case in (Case(dtype=dtype), Case(dtype=dtype, channels_last=True)):
        students, teachers = case.levels()
        torch.compiler.reset()
        with use_backend(name):
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            pairs = [(run(students, teachers)) for run in (compiled, step)]
            torch.testing.assert_close(*pairs, rtol=1e-6, atol=0)
            gradients = [torch.autograd.grad(loss, (*students, *teachers)) for loss in pairs]
        for a, b in zip(*gradients, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6 * b.abs().max().item())


def test_a_schedule_of_the_weight_compiles_once():
    from torch._dynamo.testing import CompileCounter

    (student,), (teacher,) = drawn(SHAPES[0], grad=True), drawn(SHAPES[0], seed=1)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda weight: pkd_loss(student, teacher, weight), fullgraph=True, backend=counter)
    for step in range(12):
        weight = 1.0 + step / 8
        torch.testing.assert_close(compiled(weight), pkd_loss(student, teacher, weight))
    assert counter.frame_count <= 2  # a constant, and from then on a number


@pytest.mark.parametrize(
    ("compiler", "sizes"),
    [("aot_eager", [(4, 6), (7, 3), (9, 9)]), ("inductor", [(4, 6)])],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by inductor
def test_compiles_with_the_operations_around_it(compiler, sizes):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t: pkd_loss(s.relu(), t, 6.0), fullgraph=True, dynamic=len(sizes) > 1, backend=compiler
    )
    with use_backend("cpu"):
        for size in sizes:
            (student,), (teacher,) = drawn((2, 3, *size), grad=True), drawn((2, 3, *size), seed=1)
            expected = pkd_loss(student.relu(), teacher, 6.0)
            found = compiled(student, teacher)
            torch.testing.assert_close(found, expected)
            (gradient,) = torch.autograd.grad(found, student)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_the_operator_refuses_strides_it_cannot_read():
    (level,) = drawn((2, 6, 8, 14))
    view = level[:, :, ::2]
    for name, message in (("triton", "contiguous or channels-last"), ("cpu", "dense in the same layout")):
        if _backend.available(OP)[name] is None:
            with use_backend(name), pytest.raises((InputError, RuntimeError), match=message):
                torch.ops.jdkd.pearson_fwd([view], [view], [1.0], 1e-6, False)


def test_float64_and_mixtures_with_it_use_the_reference():
    (student,), (teacher,) = drawn(SHAPES[0]), drawn(SHAPES[0], seed=1)
    loss = pkd_loss(student.double(), teacher)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, reference.pkd_loss([student.double()], [teacher.double()]), rtol=1e-12, atol=0)


def test_a_device_without_kernels_uses_the_reference():
    students, teachers = drawn(*SHAPES, grad=True), drawn(*SHAPES, seed=1)
    students, teachers = ([level.to("meta") for level in side] for side in (students, teachers))
    loss = pkd_loss(students, teachers)
    gradients = torch.autograd.grad(loss, students)
    assert loss.device.type == "meta" and [g.shape for g in gradients] == [s.shape for s in students]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_plane_of_400_by_672_is_summed_right(backend, device, channels_last):
    if backend == "triton" and device == "cpu" and channels_last:
        pytest.skip("takes minutes in Triton's interpreter")
    check(Case(shapes=((1, 1, 400, 672), (1, 2, 1, 1)), mean=30.0, channels_last=channels_last), device)


def test_what_was_made_under_inference_mode_is_taken_on_every_side():
    students, teachers = drawn(*SHAPES, grad=True), drawn(*SHAPES, seed=1)
    with torch.inference_mode():
        mask, given = torch.arange(30).view(1, 6, 5).expand(2, 6, 5) > 4, drawn(*SHAPES, seed=1)
    loss = pkd_loss(students[:1], given[:1], mask=mask)
    expected = pkd_loss(students[:1], teachers[:1], mask=mask.clone())
    assert torch.equal(*(torch.autograd.grad(x, students[0])[0] for x in (loss, expected)))
    mixed = pkd_loss([given[0], students[1]], teachers)
    assert torch.autograd.grad(mixed, students[1])[0].any()
