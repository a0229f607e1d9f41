"""Which levels are compared: none is lost without a word, and what cannot be one is refused."""

import warnings

import numpy
import pytest
import torch
from torch import Tensor, nn

from jdkd.distill import FeatureDistiller, attach, correlations
from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from jdkd.notices import Notice
from tests.distill.pyramids import PyramidDetector, batch

TWO_OF_32 = {"0": 32, "1": 32, "pool": 64}  # as torchvision's MobileNetV3 FPN has them


class Given(nn.Module):
    """Levels of given sizes, whatever the images."""

    def __init__(self, *shapes: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.backbone = nn.Module()
        self.backbone.levels = nn.ParameterList(torch.randn(2, *shape, generator=generator) for shape in shapes)
        self.backbone.forward = lambda x: {str(i): 1 * level for i, level in enumerate(self.backbone.levels)}

    def forward(self, images: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": sum(level.mean() for level in self.backbone(torch.stack(images)).values())}


def test_the_finest_level_comes_first_whatever_order_a_neck_has():
    student = PyramidDetector(4, {"coarse": 16, "fine": 4, "middle": 8}).train()
    with attach(student, PyramidDetector(4, {"a": 8, "b": 16, "c": 4}, seed=1)) as handle:
        student.forward = lambda images: {"loss": student.backbone(torch.stack(images))["fine"].mean()}
        student(batch())
    assert list(handle.losses) == [4, 8, 16]


def test_the_levels_of_a_dense_detector_at_160_pixels_are_all_distilled():
    shapes = [(4, size, size) for size in (20, 10, 5, 3, 2)]
    student, teacher = Given(*shapes).train(), Given(*shapes, seed=1)
    with attach(student, teacher) as handle:
        student(batch(size=160))
    assert list(handle.losses) == [8, 16, 32, 64, 128]


def test_two_levels_of_one_stride_are_both_distilled_in_order():
    student, teacher = PyramidDetector(4, TWO_OF_32), PyramidDetector(4, TWO_OF_32, seed=1)
    with torch.no_grad():
        for model in (student, teacher):
            model.backbone.register_forward_hook(lambda _, given, levels: levels | {"1": levels["1"].square()})
    images = batch(size=160)
    with FeatureDistiller(student, teacher, loss_weight=1.0) as distiller:
        ours, theirs = student(images), teacher(images)
        student(images)
        loss = distiller.loss()
        assert list(distiller.level_losses) == [32]
    expected = [pkd_loss(ours[key], theirs[key]) for key in "01"]
    torch.testing.assert_close(loss, sum(expected))
    torch.testing.assert_close(distiller.level_losses[32], loss.detach())
    measured = correlations(student, teacher, [images])
    apart = [pkd_loss(ours[key], theirs[key]).item() * 50 / 49 for key in "01"]
    assert list(measured) == [32] and measured[32] == pytest.approx(sum(apart) / 2, rel=1e-2)


def test_what_is_left_out_is_said_once_unless_levels_were_asked_for():
    student, teacher = PyramidDetector(4, TWO_OF_32), PyramidDetector(4, {"0": 16, "1": 32}, seed=1)
    with FeatureDistiller(student, teacher):
        with pytest.warns(Notice) as said:
            student(batch())
        assert sorted(str(notice.message) for notice in said) == [
            "the student's levels of stride [32] are not compared, since the teacher has no level of that stride left "
            "to pair with",
            "the teacher's levels of stride [16] are not compared, since the student has no level of that stride left "
            "to pair with",
        ]
        student(batch())
    with warnings.catch_warnings(), FeatureDistiller(student, teacher, levels=[32]):
        warnings.simplefilter("error")
        student(batch())


@pytest.mark.parametrize("channels", [16, 96])
def test_channels_last_are_refused(channels):
    shapes = [(16, 16, channels), (8, 8, 2 * channels)]
    student, teacher = Given(*shapes).train(), Given(*shapes, seed=1)
    with attach(student, teacher), pytest.raises(InputError, match=r"looks like \[N, H, W, C\]; let its neck return"):
        student(batch(size=64))


def test_levels_larger_than_the_images_are_refused():
    student = Given((4, 80, 80)).train()
    with attach(student, Given((4, 80, 80), seed=1)), pytest.raises(InputError, match=r"80x80 .* a stride below 1"):
        student(batch(size=64))


BAD = {
    "levels": [8, 8.0, "8", "P3", [], [8, 8], [8.5], [True], [0], [-8], [None], {"a": 1}],
    "channels": [
        3,
        "abc",
        [],
        [0.5, 1.5],
        [True, False],
        [-1, 0],
        [[0, 0]],
        [[0, 1], 3],
        [[]],
        {"0": [0.5]},
        {"0": 1},
        {},
        [0, 0],
        torch.rand(4),
        [None],
        {0: 1},
        {0},
    ],
    "loss_weight": ["6", None, float("nan"), float("inf"), -1, [6], True, torch.ones(2)],
    "statistics": ["image"],
    "zero_variance": ["drop"],
    "level_weights": [3, "12", [None], {4: 1.0}],
    "group": [3],
    "pairing": ["index"],
    "return_levels": [True],
    "momentum": [0.9],
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_are_checked_before_anything_runs(name):
    student, teacher = PyramidDetector(4, {"0": 4}), PyramidDetector(4, {"0": 4}, seed=1)
    for value in BAD[name]:
        with pytest.raises(InputError, match=name):
            attach(student, teacher, **{name: value})
    assert not student._forward_hooks and teacher.training, "nothing of it stays behind"


def test_a_weight_is_checked_when_it_is_changed():
    handle = attach(PyramidDetector(4, {"0": 4}), PyramidDetector(4, {"0": 4}, seed=1))
    with pytest.raises(InputError, match="loss_weight is nan"):
        handle.loss_weight = float("nan")
    with pytest.raises(InputError, match=r"loss_weight is tensor\(2., requires_grad=True\)"):
        handle.loss_weight = torch.tensor(2.0, requires_grad=True)
    handle.loss_weight = torch.tensor(2.0)
    assert handle.loss_weight == 2.0


def test_channels_that_the_teacher_has_not_are_named():
    student, teacher = PyramidDetector(2, {"0": 4}), PyramidDetector(4, {"0": 4}, seed=1)
    with FeatureDistiller(student, teacher, channels=[0, 4]):
        with pytest.raises(InputError, match="channels names channel 4 and the teacher's level of stride 4 has 4"):
            student(batch())
    with FeatureDistiller(student, teacher, channels=numpy.array([3, 0])) as distiller:
        student(batch())
        assert distiller.loss() > 0


WIDTHS = {4: (0, 2), 8: (3, 1, 0), 16: None}  # of a teacher with 4, 4 and 5 channels


def unlike() -> tuple[nn.Module, nn.Module]:
    """A student whose levels were pruned each in its own way, as SSD's can be, and its teacher."""
    shapes = [(4, 16, 16), (4, 8, 8), (5, 4, 4)]
    teacher, student = Given(*shapes, seed=1), Given((2, 16, 16), (3, 8, 8), (5, 4, 4))
    with torch.no_grad():
        for level, other, kept in zip(student.backbone.levels, teacher.backbone.levels, WIDTHS.values(), strict=True):
            level.copy_(other[:, list(kept)] if kept else other)
    return student.train(), teacher


@pytest.mark.parametrize(
    "channels",
    [
        [*WIDTHS.values()],
        (torch.tensor([0, 2]), numpy.array([3, 1, 0]), ()),
        {"1": [3, 1, 0], "0": [0, 2]},
    ],
)
def test_each_level_may_have_channels_of_its_own(channels):
    student, teacher = unlike()
    with FeatureDistiller(student, teacher, channels=channels) as distiller:
        student(batch())
        assert distiller.loss().item() == pytest.approx(0, abs=1e-5), "the same channels, in their order"
    assert list(distiller.level_losses) == [4, 8, 16]
    assert correlations(student, teacher, [batch()], channels=channels) == pytest.approx({4: 0, 8: 0, 16: 0}, abs=1e-6)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ([[0, 2], [3, 1, 0]], r"channels has 2 lists and the student 3 levels \(0, 1, 2\); give one list a level"),
        ({"P3": [0, 2]}, "channels names the level P3, and the student has 0, 1, 2"),
        (
            [[0, 2], [3, 1], None],
            r"has 3 channels and the teacher's 4, of which channels picks 2 \(level of stride 8\)",
        ),
        ([[0, 2], [3, 1, 4], None], "channels names channel 4 and the teacher's level of stride 8 has 4"),
    ],
)
def test_channels_that_do_not_fit_the_levels_are_named(channels, message):
    student, teacher = unlike()
    with FeatureDistiller(student, teacher, channels=channels), pytest.raises(InputError, match=message):
        student(batch())
