"""Feature distillation: what is compared, and that nothing of it stays behind."""

import copy

import pytest
import torch
from torch import Tensor

from jdkd.distill import Distiller, FeatureDistiller
from jdkd.distill.levels import pair_levels
from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from jdkd.notices import Notice
from jdkd.train import TrainConfig, fit
from tests.detectors import detector, small_spec
from tests.distill.pyramids import PyramidDetector, batch
from tests.train.scenes import write_scenes

P2_TO_P5 = {"0": 4, "1": 8, "2": 16, "3": 32}
P3_TO_P6 = {"a": 8, "b": 16, "c": 32, "d": 64}


def pearson(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """1 - r averaged over channels and summed over levels, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = (level.detach().double().transpose(0, 1).flatten(1) for level in (ours, theirs))  # [C, m]
        r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])
        total += (1 - r).mean() * (a.shape[1] - 1) / a.shape[1]
    return total


def test_is_the_pearson_loss_of_the_levels_p2_to_p5(student, teacher, images, targets):
    seen = []
    hook = student.backbone.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with FeatureDistiller(student, teacher, loss_weight=6.0) as distiller:
        student(images, targets)
        loss = distiller.loss()
    hook.remove()
    x, pyramid = seen[0]
    taught = teacher.eval().backbone(x)
    expected = pearson([pyramid[key] for key in "0123"], [taught[key] for key in "0123"])
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert loss.item() == pytest.approx(6 * expected.item(), rel=1e-4)
    assert loss.item() > 6


def test_a_teacher_that_agrees_costs_nothing(images):
    student = detector(small_spec(norm="frozen")).train()
    with FeatureDistiller(student, copy.deepcopy(student)) as distiller:
        student.backbone(student.transform(images)[0].tensors)
        assert distiller.loss().item() == pytest.approx(0, abs=1e-5)


def test_gradients_reach_the_student_and_never_the_teacher(student, teacher, images, targets):
    with FeatureDistiller(student, teacher) as distiller:
        student(images, targets)
        distiller.loss().backward()
    assert student.backbone.body.conv1.weight.grad.abs().sum() > 0
    assert student.roi_heads.box_predictor.cls_score.weight.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_heads_read_the_tapped_levels_and_both_gradients_arrive_together(student, teacher, images, targets):
    def gradients(tapped: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student.zero_grad()
        pyramids = []
        backbone = student.backbone.register_forward_hook(lambda _, inputs, output: pyramids.append((*inputs, output)))
        if tapped:
            with FeatureDistiller(student, teacher) as distiller:
                terms = student(images, targets)
                loss = distiller.loss()
        else:
            terms = student(images, targets)
            x, ours = pyramids[0]
            theirs = teacher.eval().backbone(x)
            loss = pkd_loss([ours[k] for k in "0123"], [theirs[k].detach() for k in "0123"], loss_weight=6.0)
        backbone.remove()
        (sum(terms.values()) + loss).backward()
        return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    apart, together = gradients(tapped=False), gradients(tapped=True)
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5, msg=name)  # up to 6
    seen = []
    hook = student.rpn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with FeatureDistiller(student, teacher):
        student(images, targets)
    hook.remove()
    assert [seen[0][key].grad_fn.name() for key in "0123"] == ["_PearsonLossBackward"] * 4


def test_a_loss_that_is_not_used_leaves_the_detectors_gradients_bit_for_bit(student, teacher, images, targets):
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        student.zero_grad()
        sum(student(images, targets).values()).backward()
        return [parameter.grad.clone() for parameter in student.parameters()]

    student.backbone.eval()
    alone = gradients()
    with FeatureDistiller(student, teacher):
        assert all(torch.equal(a, b) for a, b in zip(alone, gradients(), strict=True))


def test_everything_is_as_it_was_afterwards(student, teacher, images, targets):
    teacher.train().backbone.eval()
    teacher.rpn.requires_grad_(False)
    names = [name for name, _ in student.named_parameters()], list(student.state_dict())
    modes = [module.training for module in teacher.modules()]
    frozen = [parameter.requires_grad for parameter in teacher.parameters()]
    statistics = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with Distiller(student, teacher, head_weight=1.0, reuse=True) as distiller:
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        student(images, targets)
        distiller.loss()
        assert ([name for name, _ in student.named_parameters()], list(student.state_dict())) == names
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == frozen
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in teacher.state_dict().items())
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_is_restored_after_an_error_too(student, teacher):
    teacher.train()
    with pytest.raises(OSError, match="boom"), FeatureDistiller(student, teacher):
        raise OSError("boom")
    assert teacher.training and not student.backbone._forward_hooks


def test_the_loss_is_given_once_per_forward(student, teacher, images, targets):
    with FeatureDistiller(student, teacher) as distiller:
        with pytest.raises(RuntimeError, match="student has not run"):
            distiller.loss()
        student(images, targets)
        distiller.loss()
        with pytest.raises(RuntimeError, match="student has not run"):
            distiller.loss()
        student.eval()(images)
        with pytest.raises(RuntimeError, match="student has not run"):
            distiller.loss()


def test_a_loss_that_nobody_asked_for_is_gone_with_the_next_forward():
    student, teacher = PyramidDetector(4, {"0": 4}).train(), PyramidDetector(4, {"0": 4}, seed=1)
    found = []
    with FeatureDistiller(student, teacher) as distiller:
        for forwards in (1, 2):
            for seed in range(forwards, 0, -1):
                student(batch(seed=seed))
            found.append((distiller.loss().item(), distiller.level_losses[4].item()))
    assert found[0] == found[1]


def test_levels_are_paired_by_stride_not_by_index():
    student, teacher = PyramidDetector(4, P3_TO_P6), PyramidDetector(4, P2_TO_P5, seed=1)
    images = batch()
    x = torch.stack(images)
    ours, theirs = student.backbone(x), teacher.backbone(x)
    with FeatureDistiller(student, teacher, loss_weight=2.0) as distiller:
        with pytest.warns(Notice, match="are not compared"):
            student(images)
        loss = distiller.loss()
    expected = pkd_loss([ours[k] for k in "abc"], [theirs[k] for k in "123"], loss_weight=2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_levels_may_be_chosen():
    student, teacher = PyramidDetector(4, P2_TO_P5), PyramidDetector(4, P2_TO_P5, seed=1)
    with FeatureDistiller(student, teacher, loss_weight=1.0, levels=[16]) as distiller:
        ours, theirs = student(batch()), teacher(batch())
        assert distiller.loss().item() == pytest.approx(pkd_loss(ours["2"], theirs["2"]).item(), rel=1e-5)


def test_strides_survive_odd_sizes_and_the_pooled_level_is_left_out():
    level = {stride: torch.zeros(1, 1, -(-100 // stride), -(-167 // stride)) for stride in (4, 8, 16, 32, 64)}
    pyramid = {str(stride): level[stride] for stride in (4, 8, 16, 32)} | {"pool": level[64]}
    pairs = pair_levels(pyramid, dict(reversed(pyramid.items())), (100, 167))
    assert [pair.stride for pair in pairs] == [4, 8, 16, 32]
    assert all(pair.student is pair.teacher is level[pair.stride] for pair in pairs)


def test_no_common_stride_names_both():
    with FeatureDistiller(PyramidDetector(4, {"a": 4}), PyramidDetector(4, {"b": 8, "c": 16})) as distiller:
        with pytest.raises(InputError, match=r"student has levels of stride \[4\] .* teacher of stride \[8, 16\]"):
            distiller.runner.student(batch())


def test_a_level_that_is_missing_is_named():
    with FeatureDistiller(PyramidDetector(4, P2_TO_P5), PyramidDetector(4, P2_TO_P5), levels=[8, 64]) as distiller:
        with pytest.raises(InputError, match=r"levels asks for \[8, 64\]"):
            distiller.runner.student(batch())


def test_a_pruned_pyramid_is_compared_with_the_channels_it_kept():
    teacher = PyramidDetector(6, P2_TO_P5, seed=1)
    student = PyramidDetector(3, P2_TO_P5)
    kept = [4, 0, 3]
    with torch.no_grad():
        student.backbone.mix.copy_(2 * teacher.backbone.mix[kept])
    with FeatureDistiller(student, teacher, channels=torch.tensor(kept)) as distiller:
        student(batch())
        assert distiller.loss().item() == pytest.approx(0, abs=1e-4)
    with FeatureDistiller(student, teacher, channels=[0, 1, 2]) as distiller:
        student(batch())
        assert distiller.loss().item() > 0.1


def test_channel_counts_that_differ_are_named():
    teacher, student = PyramidDetector(6, P2_TO_P5), PyramidDetector(3, P2_TO_P5)
    with FeatureDistiller(student, teacher):
        with pytest.raises(InputError, match=r"student's pyramid has 3 channels and the teacher's 6 .*; give channels"):
            student(batch())
    with FeatureDistiller(student, teacher, channels=[0, 1]):
        with pytest.raises(InputError, match="has 3 channels and the teacher's 6, of which channels picks 2"):
            student(batch())


def test_a_teacher_that_shares_parameters_is_refused(student):
    with pytest.raises(InputError, match=r"share the parameter .*copy\.deepcopy"):
        FeatureDistiller(student, copy.copy(student))


def test_a_teacher_that_normalises_differently_gets_its_own_normalisation(student, images, targets):
    teacher = copy.deepcopy(student)
    teacher.transform.image_mean, teacher.transform.image_std = [0.0, 0.1, 0.2], [1.0, 0.5, 0.25]
    seen = []
    teacher.backbone.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with FeatureDistiller(student, teacher) as distiller:
        student(images[:1], targets[:1])
        distiller.loss()
    height, width = images[0].shape[-2:]
    expected = teacher.transform(images[:1])[0].tensors
    assert (height, width) == (64, 80)
    torch.testing.assert_close(seen[0][..., :height, :width], expected[..., :height, :width], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("reuse", "calls"), [(False, [1, 2, 3, 4]), (True, [1, 1, 2, 3])])
def test_the_teacher_runs_once_for_the_same_images_if_told_to(reuse, calls):
    student, teacher, images = PyramidDetector(4, P2_TO_P5), PyramidDetector(4, P2_TO_P5, seed=1), batch()
    counted = []
    with Distiller(student, teacher, reuse=reuse) as distiller:
        for given in (images, list(images), batch(seed=5)):
            student(given)
            ours = distiller.losses()["loss_pkd"]
            counted.append(teacher.backbone.calls)
        given[0].mul_(0.5)
        student(given)
        ours = distiller.losses()["loss_pkd"]
        counted.append(teacher.backbone.calls)
    assert counted == calls
    theirs = teacher.backbone(torch.stack(given))
    expected = pkd_loss(student(given).values(), theirs.values(), loss_weight=6.0)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_kept_is_not_taken_for_the_same_images_at_other_sizes_in_a_batch_of_the_same_shape(student, teacher):
    images, targets = batch(2, 9), [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}] * 2
    student.transform.min_size = (32, 64)  # drawn for each image
    losses = {}
    for reuse in (True, False):
        with Distiller(student, teacher, reuse=reuse) as distiller:
            sizes: list = []
            hook = student.transform.register_forward_hook(lambda *given, to=sizes: to.append(given[-1][0].image_sizes))
            torch.manual_seed(0)
            for _ in range(8):
                student(images, targets)
                losses.setdefault(reuse, []).append(distiller.losses()["loss_pkd"].item())
            hook.remove()
    assert [(32, 32), (64, 64)] in sizes and [(64, 64), (32, 32)] in sizes
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_what_is_kept_of_one_batch_is_not_taken_for_that_of_another_whose_forward_failed_first():
    student, teacher = PyramidDetector(4, P2_TO_P5), PyramidDetector(4, P2_TO_P5, seed=1)

    def fail(*given):
        raise torch.OutOfMemoryError("tried to allocate more than there is")

    first, second = batch(), batch(seed=5)
    with Distiller(student, teacher, reuse=True) as distiller:
        student(first)
        distiller.losses()
        hook = student.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            student(second)
        hook.remove()
        student(second)
        ours = distiller.losses()["loss_pkd"]
    theirs = teacher.backbone(torch.stack(second))
    expected = pkd_loss(student(second).values(), theirs.values(), loss_weight=6.0)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_learns_from_its_teacher_inside_fit(student, teacher, tmp_path):
    scenes = write_scenes(tmp_path)
    history = []

    with FeatureDistiller(student, teacher) as distiller:

        def losses(images, targets, step):
            yield student(images, targets) | {"loss_pkd": distiller.loss()}

        config = TrainConfig(steps=40, batch_size=4, lr=3e-3, log_every=1)
        note = lambda step, total, terms: history.append(terms["loss_pkd"])  # noqa: E731
        fit(student, scenes, config, device="cpu", losses=losses, progress=note)
    first, last = sum(history[:5]) / 5, sum(history[-5:]) / 5
    assert last < 0.6 * first
