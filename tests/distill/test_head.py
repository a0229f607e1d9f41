"""Head distillation, and both terms over one forward of the teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F

from jdkd.distill import Distiller, FeatureDistiller, HeadDistiller, can_distil_heads
from jdkd.errors import InputError
from tests.detectors import detector, small_spec
from tests.distill.pyramids import PyramidDetector


def test_is_the_divergence_of_the_class_logits_at_the_students_regions(student, teacher, images, targets):
    seen = {}
    heads = student.roi_heads
    hooks = [
        student.backbone.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0])),
        heads.box_roi_pool.register_forward_hook(lambda _, inputs, output: seen.update(regions=inputs[1:])),
        heads.box_predictor.register_forward_hook(lambda _, inputs, output: seen.update(logits=output[0])),
    ]
    with HeadDistiller(student, teacher, loss_weight=2.0) as distiller:
        student(images, targets)
        loss = distiller.loss()
    for hook in hooks:
        hook.remove()
    regions, sizes = seen["regions"]
    pooled = teacher.roi_heads.box_roi_pool(teacher.backbone(seen["x"]), regions, sizes)
    taught = F.softmax(teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))[0], dim=1)
    ours = F.log_softmax(seen["logits"], dim=1)
    expected = 2 * (taught * (taught.log() - ours)).sum(dim=1).mean()
    assert len(ours) == sum(len(region) for region in regions) == 64, "the sampled regions, not all proposals"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() > 0


def test_its_gradient_is_that_of_the_soft_cross_entropy(student, teacher, images, targets):
    with HeadDistiller(student, teacher) as distiller:
        student(images, targets)
        logits = distiller._logits
        logits.retain_grad()
        distiller.loss().backward()
    assert logits.grad.sum(dim=1).abs().max() < 1e-6, "softmax minus softmax sums to zero"
    assert logits.grad.abs().max() > 0
    assert student.backbone.body.conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_agrees_costs_nothing(images, targets):
    student = detector(small_spec(norm="frozen")).train()
    with HeadDistiller(student, copy.deepcopy(student)) as distiller:
        student(images, targets)
        assert distiller.loss().item() == pytest.approx(0, abs=1e-5)


def test_the_loss_is_given_once_per_forward(student, teacher, images, targets):
    with HeadDistiller(student, teacher) as distiller:
        student(images, targets)
        distiller.loss()
        with pytest.raises(RuntimeError, match="student has not run"):
            distiller.loss()


def test_other_classes_are_named(student):
    teacher = detector(small_spec(classes=("cat", "dog")))
    with pytest.raises(InputError, match="student knows 3 classes and the teacher 2"):
        HeadDistiller(student, teacher)


def test_the_same_classes_in_another_order_are_named(student):
    teacher = detector(small_spec(classes=("cat", "bird", "dog")))
    words = r"classes cat, dog, bird \(3\) and the teacher cat, bird, dog .*class 2 is 'dog' in the first and 'bird'"
    with pytest.raises(InputError, match=words):
        HeadDistiller(student, teacher)
    assert not can_distil_heads(student, teacher)
    del teacher.architecture
    assert can_distil_heads(student, teacher), "of one that names none, there is no telling"


def test_a_detector_without_a_class_head_is_named(student):
    other = PyramidDetector(4, {"0": 4})
    message = r"the teacher \(PyramidDetector\) has no head .* on both; distil the features only \(head_weight 0, loss"
    with pytest.raises(InputError, match=message):
        HeadDistiller(student, other)
    with pytest.raises(InputError, match=r"the student \(PyramidDetector\) has no head"):
        Distiller(other, PyramidDetector(4, {"0": 4}), head_weight=1.0)
    assert not can_distil_heads(student, other) and not can_distil_heads(other, student)


def test_both_terms_share_one_forward_of_the_teacher(student, teacher, images, targets):
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    with Distiller(student, teacher, feature_weight=6.0, head_weight=1.0) as distiller:
        student(images, targets)
        terms = distiller.losses()
        assert len(calls) == 1
    assert terms.keys() == {"loss_pkd", "loss_head_kd"}
    torch.manual_seed(0)
    with FeatureDistiller(student, teacher) as feature, HeadDistiller(student, teacher) as head:
        student(images, targets)
        apart = feature.loss(), head.loss()
    assert len(calls) == 3, "without a shared view each runs the teacher"
    torch.manual_seed(0)
    with Distiller(student, teacher, head_weight=1.0) as distiller:
        student(images, targets)
        assert distiller.loss().item() == pytest.approx(sum(apart).item(), rel=1e-5)


def test_what_the_teacher_made_of_a_batch_is_not_taken_for_the_next(student, teacher, images, targets):
    def losses(*batches):
        with Distiller(student, teacher, head_weight=1.0) as distiller:
            for batch in batches:
                torch.manual_seed(0)
                student(batch, targets)
                found = distiller.losses()
        return {name: loss.item() for name, loss in found.items()}

    other = [1 - image for image in images]
    assert losses(images, other) == pytest.approx(losses(other), rel=1e-5)
    assert losses(images) != pytest.approx(losses(other), rel=1e-2)


def test_a_weight_of_zero_leaves_the_term_out(student, teacher):
    assert Distiller(student, teacher).terms.keys() == {"loss_pkd"}
    assert Distiller(student, teacher, feature_weight=0, head_weight=1).terms.keys() == {"loss_head_kd"}


def test_nothing_runs_the_teacher_unless_a_loss_is_asked_for(student, teacher, images, targets):
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    with Distiller(student, teacher, feature_weight=0, head_weight=1):
        student(images, targets)
    with Distiller(student, teacher, head_weight=1) as distiller:
        distiller.runner.enabled = False
        student(images, targets)
        assert not calls
        distiller.runner.enabled = True
        student(images, targets)
        assert len(calls) == 1 and distiller.losses().keys() == {"loss_pkd", "loss_head_kd"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_the_same_inside_and_after_it(dtype, student, teacher, images, targets):
    """A training loop takes the losses after the autocast region that the model ran in."""
    losses = []
    for terms in (HeadDistiller(student, teacher), Distiller(student, teacher, head_weight=1.0)):
        for inside in (True, False):
            torch.manual_seed(0)
            with terms:
                with torch.autocast("cpu", dtype):
                    student(images, targets)
                    loss = terms.loss() if inside else None
                losses.append(loss if inside else terms.loss())
    assert losses[0] == losses[1] > 0 and losses[2] == losses[3] > losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype_classifies_in_its_own(dtype, student, teacher, images, targets):
    losses = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        with HeadDistiller(student, copy.deepcopy(teacher).to(kind)) as distiller:
            student(images, targets)
            losses.append(distiller.loss().item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-2 if dtype == torch.bfloat16 else 1e-5)


def test_its_weight_is_a_finite_number(student, teacher):
    with pytest.raises(InputError, match="loss_weight is nan"):
        HeadDistiller(student, teacher, loss_weight=float("nan"))
