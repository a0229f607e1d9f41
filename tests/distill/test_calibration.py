"""Detectors of unrelated origin: their channels matched or mapped on a few images, and how far that brings them."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.distill import Distiller, FeatureDistiller, attach, correlations
from jdkd.distill.calibration import Agreement, Permutations
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.reference.pearson import pkd_loss
from jdkd.train import TrainConfig, fit
from tests.detectors import detector, small_spec
from tests.distill.pyramids import Detector, PyramidDetector, batch
from tests.train.scenes import write_scenes
from tests.train.toy import same, values

WIDTH = 6  # of a Detector
WAYS = ("permute", "linear")


class Remixed(nn.Module):
    """A detector whose levels are those of another, their channels turned by ``mix`` ``[C, C]``."""

    def __init__(self, other: nn.Module, mix: Tensor) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(other.backbone)
        self.backbone.register_forward_hook(
            lambda _, inputs, levels: {k: torch.einsum("tc,nchw->nthw", mix, v) for k, v in levels.items()}
        )

    def forward(self, images: list[Tensor], targets: object = None) -> dict[str, Tensor]:
        return {"loss_head": self.backbone(torch.stack(images))["fine"].square().mean()}


def mix(kind: str, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "permute":
        return 3 * torch.eye(WIDTH)[torch.randperm(WIDTH, generator=generator)]
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q


@pytest.mark.parametrize("align", WAYS)
def test_a_teacher_that_is_the_student_in_another_basis_is_recognised(align):
    student = Detector()
    teacher = Remixed(student, mix(align))
    distiller = FeatureDistiller(student, teacher, loss_weight=1.0, align=align)
    found = distiller.calibrate([batch(4), batch(3, seed=1)])
    before = {
        stride: 1 - distance
        for stride, distance in correlations(student, teacher, [batch(4), batch(3, seed=1)]).items()
    }
    assert list(found) == [4, 8]
    for stride, (was, now) in found.items():
        assert was == pytest.approx(before[stride], abs=1e-6) and was < 0.5 and now == pytest.approx(1, abs=0.02)
    with distiller:
        student.train()(batch(2, seed=2))
        assert distiller.loss().item() == pytest.approx(0, abs=0.05), "on images that it was not fitted to"


def test_channels_are_matched_for_the_largest_sum_of_r_by_the_teachers_own_gather():
    student, teacher = Detector().train(), Detector(seed=1)
    distiller = FeatureDistiller(student, teacher, loss_weight=2.0, align="permute")
    distiller.calibrate([batch(8)])
    ours, theirs = (model.backbone(torch.stack(batch(8))) for model in (student, teacher))
    expected, picked = 0, {}
    for (name, level), index in zip(ours.items(), distiller.adapters.buffers(), strict=True):
        a, b = (x.detach().transpose(0, 1).flatten(1) for x in (level, theirs[name]))
        r = torch.corrcoef(torch.cat((a, b)))[:WIDTH, WIDTH:]  # [C_s, C_t]
        assert sorted(index.tolist()) == list(range(WIDTH))
        chosen = r[torch.arange(WIDTH), index].sum()
        for first in range(WIDTH):  # no exchange of two is better
            for second in range(first):
                other = index.clone()
                other[[first, second]] = index[[second, first]]
                assert chosen >= r[torch.arange(WIDTH), other].sum() - 1e-6
        picked[name] = index
    seen = []
    student.backbone.register_forward_hook(lambda _, inputs, levels: seen.append(levels))
    with distiller:
        student.backbone.register_forward_hook(lambda _, inputs, levels: seen.append(levels))
        student(batch(8))
        loss = distiller.loss()
    expected = pkd_loss([*ours.values()], [theirs[name][:, picked[name]].detach() for name in ours], 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all("PearsonLoss" in level.grad_fn.name() for level in seen[-1].values()), "the heads read the tapped levels"
    wanted = torch.autograd.grad(expected, [*student.parameters()])
    for ours, theirs in zip(torch.autograd.grad(loss, [*student.parameters()]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_linear_map_is_frozen_and_the_student_learns_through_it():
    student, teacher = Detector().train(), Detector(WIDTH + 3, seed=1)
    distiller = FeatureDistiller(student, teacher, align="linear")
    found = distiller.calibrate([batch(8)])
    assert all(before is None and after > 0.2 for before, after in found.values()), "of differing widths"
    assert not any(parameter.requires_grad for parameter in distiller.adapters.parameters())
    with distiller:
        student(batch(2))
        distiller.loss().backward()
    assert all(parameter.grad is None for parameter in distiller.adapters.parameters())
    assert student.backbone.fine.weight.grad.abs().sum() > 0


def test_r_after_is_of_images_that_nothing_was_fitted_to():
    """More channels than positions predict anything that they were fitted to, and nothing else."""
    student, teacher = Detector(64), Detector(64, seed=1)
    generator = torch.Generator().manual_seed(0)
    teacher.backbone.register_forward_hook(
        lambda _, inputs, levels: {k: torch.randn(v.shape, generator=generator) for k, v in levels.items()}
    )
    distiller = FeatureDistiller(student, teacher, align="linear", levels=[8])
    with pytest.warns(
        Notice, match=r"teacher \(Detector\) has nothing to say to the student .* stride \[8\]: after lin"
    ):
        found = distiller.calibrate([batch(2, size=32 + 32)])
    assert abs(found[8].after) < 0.05


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 3], [1, 2, 3]])
def test_images_are_divided_in_halves_however_they_are_batched(sizes):
    images = iter(batch(6))
    batches = [[next(images) for _ in range(size)] for size in sizes]
    for align in WAYS:
        whole, parts = (
            FeatureDistiller(Detector(), Detector(seed=1), align=align).calibrate(given)
            for given in ([batch(6)], batches)
        )
        for stride, agreement in whole.items():
            assert parts[stride] == pytest.approx(agreement, abs=1e-6)


def test_an_alignment_that_would_take_a_level_farther_away_leaves_it_as_it_is():
    student = Detector()
    teacher = copy.deepcopy(student)  # the same channels, somewhat changed: the best match is the one it comes with
    for align in WAYS:
        distiller = FeatureDistiller(student, teacher, align=align)
        found = distiller.calibrate([batch(2, size=8)])  # four positions, and one
        assert all(after >= before - 1e-9 for before, after in found.values())
    for index in FeatureDistiller(student, teacher, align="permute").calibrate([batch(2, size=8)]).values():
        assert index == pytest.approx(Agreement(1.0, 1.0))


@pytest.mark.parametrize("how", [{"align": "permute"}, {"align": "linear"}, {"adapter": True}])
def test_a_teacher_that_is_dead_is_said_once_to_have_nothing_to_say(how, recwarn):
    student, teacher = Detector(), Detector(seed=1)
    teacher.backbone.gain = 0.0
    for _ in range(2):
        found = FeatureDistiller(student, teacher, **how).calibrate([batch(4)])
        assert found == {4: (0.0, 0.0), 8: (0.0, 0.0)}
    said = [str(warning.message) for warning in recwarn if warning.category is Notice]
    assert len(said) == 1 and "nothing to say" in said[0] and "[4, 8]" in said[0] and "0.000, 0.000" in said[0]


@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")
def test_channels_that_are_constant_but_for_rounding_correlate_with_nothing():
    student, teacher = Detector(), Detector(seed=1)
    values = torch.linspace(0.1, 7, WIDTH)[:, None, None]
    teacher.backbone.register_forward_hook(
        lambda _, inputs, levels: {name: values * (1 + 1e-7 * level.sign()) for name, level in levels.items()}
    )
    for align in WAYS:
        found = FeatureDistiller(student, teacher, align=align).calibrate([batch(3), batch(4, seed=1)])
        assert found == {4: (0.0, 0.0), 8: (0.0, 0.0)}


def test_what_was_found_is_printed_a_line_a_level():
    student = Detector()
    found = FeatureDistiller(student, Remixed(student, mix("permute")), align="permute").calibrate([batch(4)])
    text = str(found)
    assert found.sentence().count("; stride 8: ") == 1 and "\n" not in found.sentence()
    first, *levels = text.splitlines()
    assert first == "mean r of student and teacher, before and after permute"
    assert len(levels) == 2 and levels[0].startswith("stride 4: ") and levels[0].endswith("-> 1.000")
    wider = str(FeatureDistiller(student, Detector(9), adapter=True).calibrate([batch(4)]))
    assert "stride 8: differing widths -> " in wider
    assert dict(FeatureDistiller(student, Detector(), levels=[8]).calibrate([batch(4)])) == {8: pytest.approx((1, 1))}


def test_a_distiller_hands_on_what_stands_between_and_its_state_brings_it_back():
    student, teacher = Detector(), Detector(seed=1)
    distiller = Distiller(student, teacher, align="permute", imitation="mse")
    assert distiller.adapters is None
    assert list(distiller.calibrate([batch(4)])) == [4, 8]
    assert isinstance(distiller.adapters, Permutations) and not [*distiller.adapters.parameters()]
    again = Distiller(student, teacher, align="permute")
    again.calibrate([batch(4, seed=9)])
    again.adapters.load_state_dict(distiller.adapters.state_dict())
    assert same(values(again.adapters), values(distiller.adapters))
    index = [*distiller.adapters.buffers()]
    with distiller:
        student.train()(batch(2))
        loss = distiller.loss()
    ours, theirs = (model.backbone(torch.stack(batch(2))) for model in (student, teacher))
    pairs = zip(ours.values(), theirs.values(), index, strict=True)
    assert loss.item() == pytest.approx(sum(6 * F.mse_loss(a, b[:, i]).item() / 2 for a, b, i in pairs), rel=1e-5)
    assert Distiller(student, teacher, feature_weight=0, align="linear").calibrate([batch(4)]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "rotate"}, "align is 'rotate'; choose one of none, permute, linear"),
        ({"align": None}, "align is None; choose one of"),
        ({"align": "linear", "adapter": True}, "adapter and align='linear' are both given; .* leave one of them out"),
        ({"align": "permute", "channels": [0]}, "align='permute' and channels are both given; .* leave channels out"),
    ],
)
def test_what_does_not_go_together_is_named(options, message):
    for make in (FeatureDistiller, attach):
        with pytest.raises(InputError, match=message):
            make(Detector(), Detector(seed=1), **options)


def test_what_cannot_be_aligned_is_refused():
    student, narrow = Detector().train(), Detector(4, seed=1)
    with pytest.raises(
        InputError, match=r"each of the student's 6 channels one of the teacher's, which has 4 .*linear"
    ):
        FeatureDistiller(student, narrow, align="permute").calibrate([batch(4)])
    assert student.training and torch.is_grad_enabled(), "a refusal leaves everything as it was"
    with pytest.raises(InputError, match=r"pyramid has 6 channels and the teacher's 4 .*or adapter=True"):
        FeatureDistiller(student, narrow).calibrate([batch(4)])
    with pytest.raises(InputError, match="calibrate was given 0 batches"):
        FeatureDistiller(student, Detector(seed=1), align="permute").calibrate([])
    distiller = FeatureDistiller(student, Detector(seed=1), align="permute")
    with (
        distiller,
        pytest.raises(InputError, match=r"align='permute' is asked for and there is none yet; call calibrat"),
    ):
        student.train()(batch(4))
    broken = Detector(seed=1)
    broken.backbone.gain = float("nan")
    with pytest.raises(InputError, match=r"values of the calibration images that are not finite \(level of stride 4\)"):
        FeatureDistiller(student, broken, align="linear").calibrate([batch(4)])


def test_without_scipy_channels_are_not_matched_and_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match=r"needs scipy, .* install jdkd\[detect\], or take align='linear'"):
        FeatureDistiller(Detector(), Detector(seed=1), align="permute").calibrate([batch(4)])
    assert FeatureDistiller(Detector(), Detector(seed=1), align="linear").calibrate([batch(4)])


def test_a_narrower_student_takes_the_best_of_the_teachers_channels():
    teacher = Detector(9, seed=1)
    student = PyramidDetector(4, {"a": 4})
    student.backbone.forward = lambda x: {"a": teacher.backbone(x)["fine"][:, [7, 2, 0, 5]] + 0}
    distiller = FeatureDistiller(student, teacher, align="permute", levels=[4])
    found = distiller.calibrate([batch(4)])
    assert found == {4: (None, pytest.approx(1))}
    assert next(distiller.adapters.buffers()).tolist() == [7, 2, 0, 5]


@pytest.mark.parametrize("align", WAYS)
def test_a_training_keeps_what_was_fitted_and_a_resumed_one_has_it_again(align, tmp_path):
    scenes, teacher = write_scenes(tmp_path / "scenes", images=4), detector(small_spec("bottleneck"), seed=7)
    config, fitted = TrainConfig(steps=1, batch_size=2), []
    for seed in (0, 1):  # the second time on other images, by which it would have been fitted otherwise
        student = detector(small_spec())
        with Distiller(student, teacher, align=align) as distiller:
            distiller.calibrate([batch(2, seed=seed)])
            begun = values(distiller.adapters)

            def losses(images, targets, step, student=student, distiller=distiller):
                yield student(images, targets) | distiller.losses()

            how = {"losses": losses, "auxiliary": distiller.adapters, "folder": tmp_path / "run", "resume": seed == 1}
            fit(student, scenes, config, device="cpu", **how)
            fitted.append(values(distiller.adapters))
            assert same(begun, fitted[-1]) == (seed == 0), "it is never trained, and the first one's is taken up"
    assert same(*fitted)
