"""A teacher that sees the student's batch at its own input size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jdkd.distill import Distiller, FeatureDistiller, attach, can_distil_heads, correlations
from jdkd.distill.alignment import PyramidSnapshot, aligned_pairs, resampled
from jdkd.distill.teacher import TeacherRunner
from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from tests.detectors import detector, small_spec
from tests.distill.pyramids import PyramidDetector, batch
from tests.distill.test_dense_heads import retinanet, seeded

KEYS = "0123"


@pytest.fixture
def small() -> nn.Module:
    """A student that looks at half of what its teacher looks at."""
    return detector(small_spec(min_size=32, max_size=64)).train()


@pytest.fixture
def squares() -> list[Tensor]:
    return batch(2, 64, seed=1)


def own(student: nn.Module, teacher: nn.Module, **options) -> FeatureDistiller:
    return FeatureDistiller(student, teacher, own_size=True, **options)


def seen_by(model: nn.Module) -> list[Tensor]:
    """The batches that reach a detector's backbone."""
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def test_the_teacher_sees_the_same_batch_through_its_own_transform(small, teacher, images, targets):
    flipped = [image.flip(-1) for image in images]
    theirs, ours = seen_by(teacher), seen_by(small)
    with own(small, teacher) as distiller:
        small(flipped, targets)
        assert distiller.loss() > 0
    assert torch.equal(theirs[0], teacher.transform(flipped)[0].tensors)
    assert ours[0].shape[-2:] == (64, 64) and theirs[0].shape[-2:] == (96, 96)


def test_the_students_levels_are_resized_to_the_teachers(small, teacher, squares, targets):
    pyramids = []
    small.backbone.register_forward_hook(lambda _, inputs, output: pyramids.append(output))
    with own(small, teacher, loss_weight=2.0) as distiller:
        small(squares, targets)
        distiller.loss().backward()
    found = [parameter.grad.clone() for parameter in small.backbone.parameters()]
    small.zero_grad()
    ours = small.backbone(small.transform(squares)[0].tensors)
    theirs = teacher.backbone(teacher.transform(squares)[0].tensors)
    assert [ours["0"].shape[-1], theirs["0"].shape[-1]] == [8, 16]
    expected = pkd_loss([ours[k] for k in KEYS], [theirs[k].detach() for k in KEYS], 2.0)
    assert sum(distiller.level_losses.values()).item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for parameter, gradient in zip(small.backbone.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_heads_read_the_necks_own_levels(small, teacher, squares, targets):
    neck, heads = [], []
    small.backbone.register_forward_hook(lambda _, inputs, output: neck.append(output))
    small.rpn.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[1]))
    with own(small, teacher):
        small(squares, targets)
    assert all(heads[0][key] is neck[0][key] for key in KEYS)


def test_of_one_size_the_loss_and_the_fused_gradient_are_as_ever(student, teacher, images, targets):
    heads, losses = [], []
    student.rpn.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[1]))
    for distiller in (FeatureDistiller(student, teacher), own(student, teacher)):
        with distiller:
            student(images, targets)
            losses.append(distiller.loss().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [heads[1][key].grad_fn.name() for key in KEYS] == ["_PearsonLossBackward"] * 4


def test_levels_meet_in_the_images_not_at_the_edges_of_what_these_are_padded_to():
    """Of positions in the image, the level at other places holds other positions: a linear function shows it."""
    ratio = torch.tensor([[0.75, 0.5], [1.5, 1.0]])  # each image by itself
    down, across = torch.meshgrid(torch.arange(24) + 0.5, torch.arange(30) + 0.5, indexing="ij")
    found = resampled((10 * down + across).expand(2, 3, -1, -1), (12, 17), ratio)
    down, across = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(17) + 0.5, indexing="ij")
    for image, (y, x) in zip(found, ratio, strict=True):
        expected = 10 * (down * y) + across * x
        torch.testing.assert_close(image[:, 1:, 1:], expected.expand(3, -1, -1)[:, 1:, 1:], rtol=1e-5, atol=1e-4)


def test_resampling_is_bilinear_and_its_gradient_is_exact():
    level = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    ratio = torch.full((2, 2), 0.5)
    expected = F.interpolate(level, (12, 16), mode="bilinear")
    torch.testing.assert_close(resampled(level, (12, 16), ratio), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: resampled(x, (5, 7), torch.tensor([[1.3, 1.1], [0.6, 0.9]])), level)


class Padded(PyramidDetector):
    """Resizes and pads images as torchvision's detectors do."""

    def __init__(self, min_size: int) -> None:
        super().__init__(5, {"0": 4, "1": 8})
        self.transform = GeneralizedRCNNTransform(min_size, 96, [0.5] * 3, [0.25] * 3)

    def forward(self, images: list[Tensor], targets: list | None = None) -> dict[str, Tensor]:
        return self.backbone(self.transform(images)[0].tensors)


def test_what_two_sizes_are_padded_to_does_not_move_one_against_the_other():
    """48 x 64 pixels are padded to 64 x 64, 64 x 85 to 64 x 96: from edge to edge the same thing lies elsewhere."""
    small, large = Padded(48).train(), Padded(64)
    images = [F.interpolate(image[None], (60, 80), mode="bicubic")[0] for image in batch(3, 6)]
    measured = correlations(small, large, [images], own_size=True)
    edges = [F.interpolate(small(images)[key], large(images)[key].shape[-2:], mode="bilinear") for key in "01"]
    by_edges = pkd_loss(edges, large(images)).item() / 2
    assert all(distance < 0.2 for distance in measured.values()) and by_edges > 0.5
    with own(small, large, loss_weight=1.0) as distiller:
        small(images)
    assert [distiller.level_losses[k].item() for k in (4, 8)] == pytest.approx([measured[4], measured[8]], rel=0.02)


def test_reuse_holds_while_the_student_sees_the_same_images_at_whatever_size(teacher, squares, targets):
    student, theirs = detector(small_spec(min_size=32)).train(), seen_by(teacher)
    with Distiller(student, teacher, own_size=True, reuse=True) as distiller:
        for side, calls in ((32, 1), (48, 1), (64, 1)):
            student.transform.min_size = (side,)
            student(squares, targets)
            distiller.losses()
            assert len(theirs) == calls
        student([image.clone() for image in squares], targets)
    assert len(theirs) == 2


def test_in_evaluation_nothing_runs(small, teacher, squares):
    theirs = seen_by(teacher)
    with own(small, teacher):
        small.eval()(squares)
        small(images=squares)
        small.backbone(torch.stack(squares))
    assert not theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype_sees_images_in_its_own(dtype, small, teacher, squares, targets):
    losses = []
    for model in (teacher, copy.deepcopy(teacher).to(dtype)):
        with own(small, model) as distiller:
            small(squares, targets=targets)
            losses.append(distiller.loss().item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_images_that_are_no_list_are_refused(small, teacher, squares):
    with own(small, teacher), pytest.raises(InputError, match=r"without a list of images .*or leave own_size out"):
        small(torch.stack(squares), [])


def test_a_backbone_called_alone_does_not_say_what_the_teacher_is_to_see(small, teacher, squares, targets):
    with own(small, teacher):
        small(squares, targets)
        with pytest.raises(InputError, match=r"ran outside of the forward of .* at its own size; call the student"):
            small.backbone(torch.stack(squares))


def test_a_recomputed_forward_is_compared_with_the_images_it_had():
    student, teacher = PyramidDetector(4, {"0": 4}), PyramidDetector(4, {"0": 4}, seed=1)
    gradients = []
    for recompute in (False, True):
        student.zero_grad()
        with own(student, teacher) as distiller:
            losses = []
            for seed in (0, 1):
                given = batch(seed=seed)
                out = checkpoint(student, given, use_reentrant=False) if recompute else student(given)
                losses.append(distiller.loss() + out["0"].mean())
            sum(losses).backward()
        gradients.append(student.backbone.mix.grad.clone())
    torch.testing.assert_close(*gradients)
    with own(student, teacher) as distiller:
        losses = []
        student.forward = lambda given: checkpoint(student.backbone, torch.stack(given), use_reentrant=False)
        for seed in (0, 1):
            losses.append(student(batch(seed=seed))["0"].mean() + distiller.loss())
        with pytest.raises(InputError, match="outside of the forward"):  # of which of the two?
            sum(losses).backward()


def test_regions_are_asked_about_at_their_places_in_the_teachers_images(small, teacher, images, targets):
    seen = {}
    heads = small.roi_heads
    heads.box_roi_pool.register_forward_hook(lambda _, inputs, output: seen.update(regions=inputs[1], sizes=inputs[2]))
    heads.box_predictor.register_forward_hook(lambda _, inputs, output: seen.update(logits=output[0]))
    assert can_distil_heads(small, teacher, own_size=True)
    with Distiller(small, teacher, feature_weight=0, head_weight=2.0, own_size=True) as distiller:
        small(images, targets)
        loss = distiller.loss()
    batched = teacher.transform(images)[0]
    sizes = batched.image_sizes
    assert seen["sizes"] == [(32, 40), (36, 32)] and sizes == [(64, 80), (72, 64)]
    regions = [2 * region for region in seen["regions"]]
    pooled = teacher.roi_heads.box_roi_pool(teacher.backbone(batched.tensors), regions, sizes)
    taught = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))[0].log_softmax(1)
    expected = F.kl_div(seen["logits"].log_softmax(1), taught, reduction="batchmean", log_target=True)
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-3) and loss > 0


def test_anchors_at_two_sizes_are_refused_and_at_one_size_compared(squares, targets):
    student, teacher = seeded(retinanet, 16, 0).train(), seeded(retinanet, 24, 1)
    nn.init.normal_(teacher.head.classification_head.cls_logits.bias)
    assert can_distil_heads(student, teacher, own_size=True)
    with Distiller(student, teacher, feature_weight=0, head_weight=1.0, own_size=True) as distiller:
        student(squares, targets)
        assert distiller.loss() > 1e-3
    for sizes in ((48,), (48, 64)):  # in training one of several is drawn
        student.transform.min_size = sizes
        assert can_distil_heads(student, teacher) and not can_distil_heads(student, teacher, own_size=True)
        with pytest.raises(
            InputError, match=r"classify anchors, and at the teacher's own .*; distil the features only"
        ):
            Distiller(student, teacher, head_weight=1.0, own_size=True)


def test_a_detector_in_anybodys_loop_may_have_such_a_teacher(small, teacher, squares, targets):
    theirs = seen_by(teacher)
    with attach(small, teacher, own_size=True):
        assert small(squares, targets)["loss_pkd"] > 0
    assert theirs[0].shape[-2:] == (64, 64)


def test_hooks_are_gone_afterwards(small, teacher, squares, targets):
    with TeacherRunner(small, teacher, own_size=True, reuse=True):
        small(squares, targets)
    for module in (*small.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_student_may_be_run_in_inference_mode_meanwhile(small, teacher, images, targets):
    with own(small, teacher) as distiller:
        with torch.inference_mode():
            held = [image.clone() for image in images]  # of which no version is counted
            assert len(small.eval()(held)) == len(small(held)) == len(images)
        small.train()(images, targets)
        assert distiller.loss() > 0


def test_images_that_are_padded_to_one_size_and_were_none_are_brought_together():
    """Of 48 and of 64 pixels, both in batches of 64: the same place of an image is another of the level."""
    level = torch.arange(16.0).expand(1, 1, 16, 16)
    ours, theirs = (PyramidSnapshot({"0": level}, (64, 64), ((side, side),)) for side in (48, 64))
    (pair,) = aligned_pairs(ours, theirs)
    inner = (torch.arange(16) + 0.5) * 48 / 64 - 0.5
    torch.testing.assert_close(pair.student[0, 0, 0, 1:], inner[1:])
    assert aligned_pairs(ours, ours)[0].student is level
