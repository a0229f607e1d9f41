"""Odd and bad inputs of the Pearson loss: each gives the right numbers, or is refused by an error that says why."""

from __future__ import annotations

import copy
import io
import pickle
from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import dist_loss, pearson_tap, pkd_loss
from jdkd.nn import DISTLoss, PearsonTap, PKDLoss

OP = "pearson"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning"),  # by dynamo
]
SIZES = ((6, 5), (3, 3), (2, 2))


def drawn(seed: int, sizes: tuple[tuple[int, int], ...] = SIZES, *, device: str = "cpu") -> list[Tensor]:
    """Levels ``[2, 4, H, W]``; those of seed 0 require grad."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, *size, generator=generator).to(device).requires_grad_(seed == 0) for size in sizes]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# ---- odd, and right ----


def test_more_levels_than_a_launch_holds_are_one_pyramid(backend, device):
    generator = torch.Generator().manual_seed(0)
    students, teachers = (list(torch.randn(18, 1, 1, 3, 2, generator=generator).to(device)) for _ in range(2))
    students = [student.requires_grad_() for student in students]
    loss, losses = pkd_loss(students, teachers, return_levels=True)
    found = torch.autograd.grad(loss, students)
    with use_backend("reference"):
        each = [pkd_loss(s, t) for s, t in zip(students, teachers, strict=True)]
        expected = torch.autograd.grad(sum(each), students)
    torch.testing.assert_close(losses, torch.stack(each).detach())
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(backend, device):
    for student in drawn(0, device=device):
        (unit,) = torch.autograd.grad(pkd_loss(student, student.detach().flip(0)), student)
        feature, loss = pearson_tap(student, student)
        (found,) = torch.autograd.grad(loss + 2 * feature.sum(), student)
        assert loss < 1e-10
        assert (found - 2).abs().max() < 1e-3 * unit.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by Triton's interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_channel(backend, device, value):
    (student, *_), (teacher, *_) = drawn(0, device=device), drawn(1, device=device)
    with torch.no_grad():
        student[0, 1, 2, 3] = value
    loss = pkd_loss(student, teacher)
    (found,) = torch.autograd.grad(loss, student)
    others = [0, 2, 3]
    (expected,) = torch.autograd.grad(pkd_loss(student[:, others], teacher[:, others]) * 3 / 4, student)
    assert loss.isnan() and found[:, 1].isnan().all()
    assert_close(found[:, others], expected[:, others])


def test_weights_may_be_zero_or_a_tensor(backend, device):
    students, teachers = drawn(0, device=device), drawn(1, device=device)
    each = [pkd_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    loss, losses = pkd_loss(students, teachers, 2.0, level_weights=torch.tensor([1.0, 0.0, 3.0]), return_levels=True)
    torch.testing.assert_close(losses, torch.stack([2 * each[0], 0 * each[1], 6 * each[2]]).detach())
    found = torch.autograd.grad(loss, students)
    assert_close(found[0], 2 * torch.autograd.grad(each[0], students[0])[0])
    assert not found[1].any()


def test_levels_may_be_views_of_any_kind(backend, device):
    generator = torch.Generator().manual_seed(2)
    drawn_complex = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.complex64).to(device)
    (teacher, *_) = drawn(1, device=device)
    views = {
        "negative": drawn_complex.conj().imag,  # a lazy minus sign that a kernel would not see
        "expanded": teacher[:, :, :1].expand(-1, -1, 6, -1),
        "not at the start": torch.randn(241, generator=generator).to(device)[1:].view(2, 4, 6, 5),
        "images last": torch.randn(4, 6, 5, 2, generator=generator).to(device).permute(3, 0, 1, 2),
    }
    for name, view in views.items():
        plain = torch.empty(view.shape, device=device).copy_(view)
        for ours, theirs in (((view, teacher), (plain, teacher)), ((teacher, view), (teacher, plain))):
            assert torch.equal(pkd_loss(*ours), pkd_loss(*theirs)), name
    view, plain = (torch.randn(2, 6, 5, 4, generator=generator).to(device).permute(0, 3, 1, 2) for _ in range(2))
    view.requires_grad_()
    (found,) = torch.autograd.grad(pkd_loss(view, plain), view)
    assert found.stride() == view.stride(), "images of the layout [N, H, W, C] are read and written as they are"


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_comes_back_as_one(kind):
    students, teachers = drawn(0), drawn(1)
    features, loss = pearson_tap(kind(zip("abc", students, strict=True)), teachers)
    assert type(features) is kind and sorted(features) == ["a", "b", "c"]
    assert features["c"].data_ptr() == students[2].data_ptr() and torch.equal(loss, pkd_loss(students, teachers))


def test_what_autograd_keeps_may_be_moved_away_and_back():
    students, teachers = drawn(0), drawn(1)
    with torch.autograd.graph.save_on_cpu():
        features, loss = pearson_tap(students, teachers)
    features[0].retain_grad()
    found = torch.autograd.grad(loss + features[0].sum(), [*students, features[0]])
    expected = torch.autograd.grad(pkd_loss(students, teachers) + students[0].sum(), students)
    for a, b in zip(found, expected, strict=False):
        assert_close(a, b)
    assert torch.equal(found[3], torch.ones_like(found[3])), "a feature's own gradient is that of the heads"


# ---- refused ----


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (torch.zeros(2, 4, 6), r"level 0 has shape \(2, 4, 6\)"),
        (torch.zeros(1, 2, 4, 6, 5), r"level 0 has shape \(1, 2, 4, 6, 5\)"),
        (torch.zeros(0, 4, 6, 5), r"level 0 has shape \(0, 4, 6, 5\)"),
        (torch.zeros(2, 0, 6, 5), r"level 0 has shape \(2, 0, 6, 5\)"),
        (torch.zeros(2, 4, 6, 5, dtype=torch.complex64), "level 0 has shape .* dtype torch.complex64"),
        ([torch.zeros(2, 4, 6, 5)], "level 0 is a list"),
        ("P3", "level 0 is a str"),
    ],
)
def test_what_is_no_level_is_refused_on_either_side(level, message):
    (good, *_) = drawn(1)
    with pytest.raises(InputError, match=f"student {message}"):
        pkd_loss([level], [good])
    with pytest.raises(InputError, match=f"teacher {message}"):
        pearson_tap([good], [level])


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 1, 6, 5).bool(), torch.ones(6, 5).bool(), torch.ones(2, 6, 5).byte(), torch.ones(3, 6, 5).bool()],
    ids=["4-D", "2-D", "uint8", "images"],
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(
        InputError, match=r"mask of level 0 has shape .* it must be a bool \[2, H, W\] on cpu, True where"
    ):
        pkd_loss(drawn(0), drawn(1), mask=mask)


@pytest.mark.parametrize("levels", [[-1], [3]])
def test_levels_are_counted_from_zero(levels):
    with pytest.raises(InputError, match=r"name some of the student's levels \[0, 1, 2\]"):
        pkd_loss(drawn(0), drawn(1), levels=levels)


def test_a_batch_of_incoming_gradients_is_refused():
    (student, *_), (teacher, *_) = drawn(0), drawn(1)
    with pytest.raises(NotImplementedError, match="ask for one gradient after the other"):
        torch.autograd.grad(pkd_loss(student, teacher), student, torch.ones(2), is_grads_batched=True)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, "6", None, True, torch.ones(2)], ids=str)
def test_a_weight_that_is_no_number_is_refused(weight):
    for call in (
        lambda: pkd_loss(drawn(0), drawn(1), weight),
        lambda: pkd_loss(drawn(0), drawn(1), level_weights=[weight] * 3),
        lambda: dist_loss(torch.randn(3, 4), torch.randn(3, 4), weight),
        lambda: dist_loss(torch.randn(3, 4), torch.randn(3, 4), 1.0, weight),
        lambda: dist_loss(torch.randn(3, 4), torch.randn(3, 4), tau=weight),
    ):
        with pytest.raises(InputError, match=r"is or holds .* it must be a finite number, 0 or more"):
            call()


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    expected = pkd_loss(drawn(0), drawn(1), 2.0, levels=[1])
    levels, factor = numpy.array([1]), numpy.float32(2)
    assert torch.equal(pkd_loss(drawn(0), drawn(1), factor, numpy.bool_(True), levels=levels), expected)
    assert torch.equal(pkd_loss(drawn(0), drawn(1), levels=levels, level_weights=numpy.array([2.0])), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, r"levels is 1; give indices of the student's levels in a list, \[0, 1\]"),
        ({"levels": "0"}, "levels is '0'; give indices"),
        ({"levels": ["0"]}, "levels holds '0'; name some of the student's levels by their indices, as ints"),
        ({"levels": [0.0]}, "levels holds 0.0"),
        ({"levels": [True]}, "levels holds True"),
        ({"resize_stu": "False"}, "resize_stu is 'False'; give True"),
        ({"mask": {}}, "mask is a dict; pass a bool tensor"),
        ({"preds_S": 1}, "student and preds_S are both given"),
        ({"preds_T": 1}, "teacher and preds_T are both given"),
    ],
)
def test_what_is_no_option_is_refused_in_a_sentence(options, message):
    with pytest.raises(InputError, match=message):
        pkd_loss(drawn(0), drawn(1), **options)


def test_the_names_of_the_published_loss_are_taken():
    expected = pkd_loss(drawn(0), drawn(1), 6.0)
    assert torch.equal(PKDLoss(6.0)(preds_S=drawn(0), preds_T=drawn(1)), expected)
    assert torch.equal(PKDLoss(loss_weight=6.0)(drawn(0), preds_T=drawn(1)), expected)
    assert torch.equal(pkd_loss(preds_S=drawn(0), preds_T=drawn(1), loss_weight=6.0), expected)
    with pytest.raises(InputError, match="student is a NoneType"):
        PKDLoss()(preds_T=drawn(1))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_writing_to_a_feature_before_the_backward_pass_is_refused_with_the_remedy(side):
    student, teacher = drawn(0)[0] * 1.5, drawn(1)[0].detach().clone()
    loss = pkd_loss(student, teacher)
    (student if side == "student" else teacher).relu_()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation .* write to a copy, or call the loss"):
        loss.backward()
    assert "inference_mode" in pkd_loss.__doc__  # where torch cannot tell


def test_writing_to_the_features_is_refused_in_a_compiled_step_too():
    def step(student: Tensor, teacher: Tensor) -> Tensor:
        feature, loss = pearson_tap(student * 1.5, teacher)
        return feature.relu_().sum() + loss

    torch.compiler.reset()
    with use_backend("cpu"), pytest.raises(RuntimeError, match="is being modified inplace"):
        torch.compile(step, backend="aot_eager")(drawn(0)[0], drawn(1)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_script_is_refused():
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments with defaults"):
        torch.jit.script(PKDLoss())


# ---- modules in models ----


@pytest.mark.parametrize(
    "module", [PKDLoss(6.0, False, pairing="stride", levels=[0]), PearsonTap(2.0, level_weights=[0.5] * 3), DISTLoss()]
)
def test_a_model_that_owns_the_loss_is_copied_and_saved(module):
    model, buffer = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "loss": module}), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    students, teachers = ([torch.randn(4, 5)] * 2) if isinstance(module, DISTLoss) else (drawn(0), drawn(1))
    expected = module(students, teachers)
    for own in copies:
        assert repr(own) == repr(model) and list(own.state_dict()) == ["conv.weight", "conv.bias"]
        found = own["loss"](students, teachers)
        assert torch.equal(*(answer[1] if isinstance(answer, tuple) else answer for answer in (found, expected)))


def test_a_model_with_the_loss_is_exported_for_inference():
    students, teachers = ([level.detach() for level in drawn(seed)] for seed in (0, 1))
    exported = torch.export.export(PKDLoss(6.0), (students, teachers)).module()
    others = [level + 1 for level in students], [level.square() for level in teachers]
    torch.testing.assert_close(exported(*others), pkd_loss(*others, 6.0))


def test_dist_takes_one_sample_without_the_relation_between_samples():
    student, teacher = torch.randn(1, 6), torch.randn(1, 6)
    p, q = student.softmax(1).double(), teacher.softmax(1).double()
    expected = 1 - torch.corrcoef(torch.cat([p, q]))[0, 1]
    torch.testing.assert_close(dist_loss(student, teacher, intra_weight=0).double(), expected, rtol=1e-4, atol=1e-6)
