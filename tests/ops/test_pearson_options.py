"""What departs from the published loss by argument: pairing, levels, masks, statistics, constant channels, DIST."""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import dist_loss, pearson_tap, pkd_loss
from jdkd.notices import Notice
from jdkd.reference import pearson as reference

OP = "pearson"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by Triton's interpreter
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def drawn(*sizes: tuple[int, int], seed: int = 0, images: int = 2, channels: int = 4, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(images, channels, *size, generator=generator) for size in sizes]
    return [level.to(device).requires_grad_(seed == 0) for level in levels]


def assert_same(found: Tensor, expected: Tensor, students: list[Tensor]) -> None:
    """Equal losses with equal gradients."""
    torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, students, retain_graph=True) for loss in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-4, atol=1e-5 * b.abs().max().item())


# ---- which levels ----


def test_levels_of_the_same_stride_are_paired_whatever_their_place():
    """P3-P7 of a dense student and P2-P5 of a two-stage teacher share P3-P5."""
    students = drawn((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    teachers = drawn((200, 336), (100, 168), (50, 84), (25, 42), seed=1)
    expected = pkd_loss(students[:3], teachers[1:], 6.0)
    with pytest.warns(Notice, match="leaves out the (student's levels of sizes 13x21, 7x11|teacher's .* 200x336)"):
        assert torch.equal(pkd_loss(students, teachers, 6.0, pairing="stride"), expected)
    features, loss = pearson_tap(students, teachers, 6.0, pairing="stride")
    assert torch.equal(loss, expected)
    assert [a is b for a, b in zip(features, students, strict=True)] == [False, False, False, True, True]


def test_a_level_that_rounds_up_still_has_its_stride():
    students, teachers = drawn((25, 42), (13, 21)), drawn((25, 43), (12, 21), seed=1)
    assert torch.equal(pkd_loss(students, teachers, pairing="stride"), pkd_loss(students, teachers))


def test_no_stride_in_common_is_an_error_with_both_sizes():
    with pytest.raises(InputError, match=r"of sizes 8x8, 4x4, has the stride of one of the teacher, of sizes 64x64"):
        pkd_loss(drawn((8, 8), (4, 4)), drawn((64, 64), seed=1), pairing="stride")


def test_only_the_levels_asked_for_count():
    students, teachers = drawn((6, 5), (3, 3), (2, 2)), drawn((6, 5), (3, 3), (2, 2), seed=1)
    expected = pkd_loss(students[0], teachers[0]) + pkd_loss(students[2], teachers[2])
    torch.testing.assert_close(pkd_loss(students, teachers, levels=[2, 0]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [2]}, r"levels is \[2\]; name some of the student's levels \[0, 1\]"),
        ({"levels": []}, r"levels is \[\]"),
        ({"levels": [1, 1]}, r"levels is \[1, 1\]; .* once each"),
        ({"pairing": "size"}, "pairing is 'size'; choose one of index, stride"),
        ({"level_weights": [1.0]}, "level_weights has 1 values for 2 pairs"),
        ({"level_weights": {0: 1.0, 1: 2.0}}, "level_weights is a dict"),
        ({"level_weights": "12"}, "level_weights is a str"),
        ({"level_weights": [1.0, None]}, "level_weights is or holds None; it must be a finite number"),
        ({"loss_weight": float("nan")}, "loss_weight is or holds nan"),
        ({"loss_weight": torch.ones((), requires_grad=True)}, "loss_weight is a tensor that requires a gradient"),
        ({"group": "world"}, "group is 'world'; pass a process group"),
        ({"statistics": "image"}, "statistics is 'image'; choose one of batch, instance"),
        ({"zero_variance": "drop"}, "zero_variance is 'drop'; choose one of keep, skip"),
        ({"mask": torch.ones(2, 6, 5)}, r"mask of level 0 has shape \(2, 6, 5\) and dtype torch.float32"),
        ({"mask": torch.ones(1, 6, 5).bool()}, r"mask of level 0 has shape \(1, 6, 5\)"),
        ({"mask": [torch.ones(2, 6, 5).bool()]}, "mask has 1 entries for 2 pairs"),
        ({"mask": [None, None]}, "mask of level 0 is a NoneType; it must be a bool"),
        ({"mask": torch.ones(2, 6, 5, device="meta").bool()}, r"dtype torch.bool on meta; it must be a bool .* on cpu"),
    ],
)
def test_what_is_asked_for_and_is_not_there_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        pkd_loss(drawn((6, 5), (3, 3)), drawn((6, 5), (3, 3), seed=1), **options)


def test_weights_follow_the_order_in_which_levels_are_named():
    students, teachers = drawn((6, 5), (3, 3), (2, 2)), drawn((6, 5), (3, 3), (2, 2), seed=1)
    loss, losses = pkd_loss(students, teachers, levels=(2, 0), level_weights=[10.0, 1.0], return_levels=True)
    each = torch.stack([10 * pkd_loss(students[2], teachers[2]), pkd_loss(students[0], teachers[0])])
    torch.testing.assert_close(losses, each.detach())
    torch.testing.assert_close(loss, each.sum())


def test_mappings_of_the_same_names_are_paired_by_name():
    students, teachers = drawn((6, 5), (3, 3)), drawn((6, 5), (3, 3), seed=1)
    named = {"p3": students[0], "p4": students[1]}
    turned = {"p4": teachers[1], "p3": teachers[0]}
    assert torch.equal(pkd_loss(named, turned), pkd_loss(students, teachers))
    features, loss = pearson_tap(named, turned)
    assert list(features) == ["p3", "p4"] and torch.equal(loss, pkd_loss(students, teachers))


def test_levels_on_several_devices_are_refused():
    students, teachers = drawn((6, 5), (3, 3)), drawn((6, 5), (3, 3), seed=1)
    for loss in (pkd_loss, pearson_tap):
        with pytest.raises(InputError, match="level 1 is on meta and level 0 on cpu; move all levels to one device"):
            loss([students[0], students[1].to("meta")], [teachers[0], teachers[1].to("meta")])


class Pyramid(NamedTuple):
    p3: Tensor
    p4: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda levels: Pyramid(*levels),
        tuple,
        lambda levels: defaultdict(list, zip("ab", levels, strict=True)),
        lambda levels: MappingProxyType(dict(zip("ab", levels, strict=True))),
    ],
)
def test_the_tap_gives_back_what_it_was_given(wrap):
    students, teachers = wrap(drawn((6, 5), (3, 3))), drawn((6, 5), (3, 3), seed=1)
    features, _ = pearson_tap(students, teachers)
    expected = dict if isinstance(students, MappingProxyType) else type(students)
    assert type(features) is expected
    inside = features.values() if isinstance(features, dict) else features
    assert all(isinstance(level, Tensor) and level.requires_grad for level in inside)


OPTIONS = {
    "mask": {"mask": torch.arange(30).view(1, 6, 5).expand(2, 6, 5) > 4},
    "stride": {"pairing": "stride"},
    "levels": {"levels": (1,), "level_weights": (2.0,)},
    "instance": {"statistics": "instance"},
    "skip": {"zero_variance": "skip"},
    "return_levels": {"return_levels": True},
}


@pytest.mark.parametrize(
    ("name", "tap"),
    [("mask", False), ("mask", True), ("stride", True), ("levels", False), ("instance", True), ("skip", False),
     ("return_levels", False), ("return_levels", True)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning")  # by dynamo
def test_every_option_compiles_as_one_graph(name, tap):
    def step(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        if not tap:
            found = pkd_loss(students, teachers, 6.0, **OPTIONS[name])
            return found[0] if isinstance(found, tuple) else found
        features, loss, *_ = pearson_tap(students, teachers, 6.0, **OPTIONS[name])
        return loss + sum(level.square().sum() for level in features)

    torch.compiler.reset()
    students, teachers = drawn((6, 5), (3, 3)), drawn((6, 5), (3, 3), seed=1)
    with use_backend("cpu"):
        assert_same(
            torch.compile(step, fullgraph=True, backend="aot_eager")(students, teachers),
            step(students, teachers),
            students[1:],
        )


# ---- weights and what is logged ----


def test_levels_have_weights_and_are_reported(backend, device):
    students = drawn((6, 5), (3, 3), device=device)
    teachers = drawn((6, 5), (3, 3), seed=1, device=device)
    loss, losses = pkd_loss(students, teachers, 6.0, level_weights=[0.5, 2.0], return_levels=True)
    each = [pkd_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    assert_same(loss, 3 * each[0] + 12 * each[1], students)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, torch.stack([3 * each[0], 12 * each[1]]).detach())
    *_, tapped = pearson_tap(students, teachers, 6.0, level_weights=[0.5, 2.0], return_levels=True)
    assert torch.equal(tapped, losses)


# ---- constant channels ----


@pytest.mark.parametrize(("value", "layout"), [(0.0, LAYOUTS[0]), (0.7, LAYOUTS[1]), (-300.1, LAYOUTS[0])])
def test_constant_channels_are_skipped_on_request(backend, device, layout, value):
    (student,), (teacher,) = drawn((9, 7), device=device), drawn((9, 7), seed=1, device=device)
    with torch.no_grad():
        student[:, 1] = value
        teacher[:, 3] = value
    student = student.detach().contiguous(memory_format=layout).requires_grad_()
    found = pkd_loss(student, teacher, 6.0, zero_variance="skip")
    live = [0, 2]
    expected = pkd_loss(student[:, live], teacher[:, live], 6.0) * len(live) / 4  # the mean stays over all channels
    assert_same(found, expected, [student])
    (gradient,) = torch.autograd.grad(found, student)
    assert not gradient[:, [1, 3]].any()


def test_a_masked_student_learns_as_a_slim_one(backend, device):
    (student,), (teacher,) = drawn((8, 8), device=device), drawn((8, 8), seed=1, device=device)
    masked = student * torch.tensor([1.0, 0.0, 1.0, 0.0], device=device).view(1, 4, 1, 1)
    loss = pkd_loss(masked, teacher, zero_variance="skip")
    assert_same(loss, pkd_loss(student[:, ::2], teacher[:, ::2]) / 2, [student])


def test_by_default_a_constant_channel_counts_as_published(backend, device):
    (student,), (teacher,) = drawn((9, 7), device=device), drawn((9, 7), seed=1, device=device)
    with torch.no_grad():
        student[:, 1] = 0
    found = pkd_loss(student, teacher)
    torch.testing.assert_close(found, reference.pkd_loss([student], [teacher]), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient[:, 1].abs().max() > 1e4 * gradient[:, 0].abs().max()


def test_a_channel_of_nan_is_never_skipped(backend, device):
    (student,), (teacher,) = drawn((9, 7), device=device), drawn((9, 7), seed=1, device=device)
    with torch.no_grad():
        student[0, 1, 2, 3] = float("nan")
    assert pkd_loss(student, teacher, zero_variance="skip").isnan()


# ---- padding ----


def padding(images: int, height: int, width: int) -> Tensor:
    mask = torch.zeros(images, height, width, dtype=torch.bool)
    for i in range(images):
        mask[i, : height - i, : width // (1 + i)] = True
    return mask


def by_hand(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The formula over the positions that count, ``[C, count]``."""
    s, t = (level.permute(1, 0, 2, 3)[:, mask][None, :, :, None] for level in (student, teacher))
    return reference.pkd_loss([s], [t])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tap", [False, True])
def test_padded_positions_neither_count_nor_learn(layout, tap):
    (student,), (teacher,) = drawn((9, 8)), drawn((9, 8), seed=1)
    student = (student.detach() + 50).contiguous(memory_format=layout).requires_grad_()
    mask = padding(2, 9, 8)
    for garbage in (0.0, 1e4, float("nan")):
        with torch.no_grad():
            student[~mask[:, None].expand_as(student)] = garbage
        wide = student.detach().double().requires_grad_()
        expected = by_hand(wide, teacher.double(), mask)
        if tap:
            feature, loss = pearson_tap(student, teacher, mask=mask)
            (found,) = torch.autograd.grad(loss + 0 * feature[0, 0, 0, 0], student)
        else:
            loss = pkd_loss(student, teacher, mask=mask)
            (found,) = torch.autograd.grad(loss, student)
        (gradient,) = torch.autograd.grad(expected, wide)
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found, gradient.float(), rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        assert not found[~mask[:, None].expand_as(found)].any()


def test_one_mask_in_pixels_serves_all_levels():
    students, teachers = drawn((16, 16), (8, 8)), drawn((16, 16), (8, 8), seed=1)
    pixels = torch.zeros(2, 64, 64, dtype=torch.bool)
    pixels[0], pixels[1, :32, :48] = True, True
    found = pkd_loss(students, teachers, mask=pixels)
    expected = sum(by_hand(s, t, pixels[:, ::k, ::k]) for s, t, k in zip(students, teachers, (4, 8), strict=True))
    assert_same(found, expected, students)
    each = [pixels[:, ::4, ::4], pixels[:, ::8, ::8]]
    assert torch.equal(pkd_loss(students, teachers, mask=each), found)


def test_a_mask_of_all_changes_nothing_and_of_none_gives_zero():
    (student,), (teacher,) = drawn((9, 8)), drawn((9, 8), seed=1)
    everything = torch.ones(2, 9, 8, dtype=torch.bool)
    assert_same(pkd_loss(student, teacher, mask=everything), pkd_loss(student, teacher), [student])
    loss = pkd_loss(student, teacher, mask=~everything)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


def test_head_gradients_pass_through_the_padding():
    (student,), (teacher,) = drawn((9, 8)), drawn((9, 8), seed=1)
    mask = padding(2, 9, 8)
    feature, loss = pearson_tap(student, teacher, mask=mask)
    (found,) = torch.autograd.grad(feature.square().sum() + loss, student)
    (expected,) = torch.autograd.grad(student.square().sum() + pkd_loss(student, teacher, mask=mask), student)
    torch.testing.assert_close(found, expected)


# ---- statistics of every image ----


@pytest.mark.parametrize(("tap", "layout"), [(False, LAYOUTS[0]), (True, LAYOUTS[1])])
def test_instance_statistics_are_those_of_every_image_alone(backend, device, layout, tap):
    students = drawn((6, 5), (3, 3), images=3, device=device)
    students = [s.detach().contiguous(memory_format=layout).requires_grad_() for s in students]
    teachers = drawn((6, 5), (3, 3), seed=1, images=3, device=device)
    if tap:
        features, found = pearson_tap(students, teachers, 6.0, statistics="instance")
        found = found + sum(f.square().sum() for f in features)
    else:
        found = pkd_loss(students, teachers, 6.0, statistics="instance")
    each = [pkd_loss([s[i : i + 1] for s in students], [t[i : i + 1] for t in teachers], 6.0) for i in range(3)]
    expected = sum(each) / 3 + (sum(s.square().sum() for s in students) if tap else 0)
    assert_same(found, expected, students)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["batch", "instance"])
def test_half_precision_is_rounded_once_under_a_mask(dtype, statistics):
    (student,), (teacher,) = drawn((9, 8)), drawn((9, 8), seed=1)
    student, teacher = (student.detach() + 20).to(dtype).requires_grad_(), teacher.to(dtype)
    mask, head = padding(2, 9, 8), torch.randn(2, 4, 9, 8).to(dtype) / 100
    feature, loss = pearson_tap(student, teacher, mask=mask, statistics=statistics)
    (found,) = torch.autograd.grad([loss, feature], student, [torch.ones_like(loss), head])
    wide, other = student.detach().double().requires_grad_(), teacher.double()
    each = [slice(None)] if statistics == "batch" else [slice(i, i + 1) for i in range(2)]
    exact = sum(by_hand(wide[i], other[i], mask[i]) for i in each) / len(each)
    (gradient,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)
    expected = gradient + head.double()
    assert ((found.double() - expected).abs() <= torch.finfo(dtype).eps * 0.51 * expected.abs() + 1e-7).all()


def test_instance_statistics_know_padding():
    (student,), (teacher,) = drawn((9, 8)), drawn((9, 8), seed=1)
    mask = padding(2, 9, 8)
    found = pkd_loss(student, teacher, mask=mask, statistics="instance")
    each = [by_hand(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert_same(found, sum(each) / 2, [student])


# ---- DIST ----


def published_dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, tau: float) -> Tensor:
    """The formulas of the paper's section 3, written out."""

    def r(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))

    p, q = (torch.softmax(logits / tau, 1) for logits in (student, teacher))
    return tau**2 * (beta * (1 - r(p, q).mean()) + gamma * (1 - r(p.T, q.T).mean()))


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (1.0, 0.0, 1.0), (0.0, 3.0, 2.0)])
def test_dist_is_the_correlation_within_rows_and_columns(backend, device, beta, gamma, tau):
    torch.manual_seed(0)
    student = torch.randn(7, 11).to(device).requires_grad_()
    teacher = torch.randn(7, 11).to(device)
    wide = student.detach().double().requires_grad_()
    found, expected = (
        dist_loss(student, teacher, beta, gamma, tau),
        published_dist(wide, teacher.double(), beta, gamma, tau),
    )
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    (a,), (b,) = torch.autograd.grad(found, student), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_dist_of_logits_in_half_precision():
    torch.manual_seed(0)
    student, teacher = (torch.randn(64, 80) * 4).bfloat16(), (torch.randn(64, 80) * 4).bfloat16()
    expected = published_dist(student.double(), teacher.double(), 1.0, 1.0, 1.0)
    with use_backend("cpu"):
        torch.testing.assert_close(dist_loss(student, teacher).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "weights", "message"),
    [
        ((4, 5, 1), (4, 5, 1), (1, 1), r"student has shape \(4, 5, 1\)"),
        ((4, 5), (4, 6), (1, 1), r"student has shape \(4, 5\) on cpu and teacher \(4, 6\)"),
        ((1, 5), (1, 5), (1, 1), "student has 1 samples; give at least 2, or intra_weight=0"),
        ((4, 5), (4, 5), (0, 0), "both 0"),
        ((4, 5), (4, 5), (1, 1, 0.0), "tau is 0.0; a temperature must be positive"),
    ],
)
def test_dist_refuses_what_has_no_correlation(student, teacher, weights, message):
    with pytest.raises(InputError, match=message):
        dist_loss(torch.randn(student), torch.randn(teacher), *weights)
