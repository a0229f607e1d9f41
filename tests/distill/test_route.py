"""attach() finds the detector inside whatever wraps it, or says why it does not."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from jdkd.distill import attach, correlations, pyramids
from jdkd.errors import InputError
from jdkd.notices import Notice
from tests.detectors import detector, small_spec
from tests.distill.frameworks import HuggingFace, Levels, Plain, Processor, head_loss
from tests.graph.networks import awake, pan_detector


class Wrapper(nn.Module):
    """As a Lightning module: the detector is in ``model``, beside what has no weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, nn.L1Loss()

    def forward(self, *args: object) -> dict[str, Tensor]:
        return self.model(*args)

    def training_step(self, *args: object) -> dict[str, Tensor]:
        return self.model(*args)


class Normalising(Wrapper):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return self.model((inputs - 0.5) / 0.25)


class Average:
    """No module, but holds one."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model)


class NoBackbone(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.levels = Levels(seed)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss_box": head_loss(self.levels(x))}


WRAPPED = {
    "average": (AveragedModel, {}),
    "average, named": (AveragedModel, {"neck": "backbone", "teacher_neck": "module.backbone"}),
    "average, inside": (AveragedModel, {"neck": "backbone.fpn", "teacher_neck": "module.backbone.fpn"}),
    "lightning": (Wrapper, {}),
    "lightning, named": (Wrapper, {"neck": "backbone", "teacher_neck": "model.backbone"}),
    "lightning, as the student's": (Wrapper, {"neck": "backbone"}),
    "lightning of an average": (lambda model: Wrapper(AveragedModel(model)), {}),
    "average of lightning": (lambda model: AveragedModel(Wrapper(model)), {"neck": "backbone"}),
    "no module": (Average, {}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_teacher_sees_and_says_what_it_does_unwrapped(name, student, images, targets):
    wrap, options = WRAPPED[name]
    teacher = detector(small_spec("bottleneck", min_size=800, max_size=800), seed=7)
    teacher.transform.image_mean = [0.1, 0.2, 0.3]

    def loss(teacher: object, **options: object) -> float:
        torch.manual_seed(0)
        with attach(student, teacher, **options):
            return student(images, targets)["loss_pkd"].item()

    student.backbone.eval()
    assert loss(wrap(teacher), **options) == pytest.approx(loss(teacher), rel=1e-5)


@pytest.mark.parametrize("wrap", [Wrapper, AveragedModel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_student_is_distilled_as_the_one_inside(wrap, student, teacher, images, targets):
    student.backbone.eval()
    with attach(student, teacher):
        torch.manual_seed(0)
        expected = student(images, targets)["loss_pkd"].item()
    wrapped = wrap(student)
    inner = wrapped.module if isinstance(wrapped, AveragedModel) else student
    for options in ({}, {"neck": "backbone"}):
        torch.manual_seed(0)
        with attach(wrapped, teacher, **options):
            called = wrapped if isinstance(wrapped, Wrapper) else inner
            assert called(images, targets)["loss_pkd"].item() == pytest.approx(expected, rel=1e-5)


def test_a_wrapper_that_normalises_inside_gives_the_teacher_what_its_backbone_sees():
    for build, neck in ((Plain, "backbone"), (NoBackbone, "levels")):
        inner, teacher = build().train(), build(1)
        images = torch.rand(2, 3, 16, 24)
        options = {"neck": f"model.{neck}", "teacher_neck": neck}
        with attach(Normalising(inner), teacher, **options):
            Normalising(inner)  # another one changes nothing
            seen = Normalising(inner)
        with attach(seen, teacher, **options):
            seen(images)
        backbone = getattr(teacher, neck)
        torch.testing.assert_close(backbone.images, (images - 0.5) / 0.25)


def test_a_training_step_that_goes_past_the_attached_module_is_refused(student, teacher, images, targets):
    wrapped = Wrapper(student).train()
    with attach(wrapped, teacher):
        with pytest.raises(
            InputError, match=r"Pyramid ran outside of the forward of Wrapper, .* attach the module that"
        ):
            wrapped.training_step(images, targets)
        assert "loss_pkd" in wrapped(images, targets)
        with torch.no_grad():  # as for recalibration, which trains nothing
            wrapped.training_step(images, targets)
    with attach(wrapped.model, teacher):
        assert "loss_pkd" in wrapped.training_step(images, targets)


def test_a_forward_that_failed_is_over(student, teacher, images, targets):
    wrapped, heads = Wrapper(student).train(), student.roi_heads

    def fail(*given):
        raise torch.OutOfMemoryError("tried to allocate more than there is")

    with attach(wrapped, teacher):
        hook = heads.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError, match="more than there is"):
            wrapped(images, targets)
        hook.remove()
        with pytest.raises(InputError, match=r"Pyramid ran outside of the forward of Wrapper"):
            wrapped.training_step(images, targets)
        assert "loss_pkd" in wrapped(images, targets)


def test_several_detectors_in_one_module_are_told_apart_by_a_path(student, teacher, images, targets):
    both = nn.ModuleDict({"small": student, "large": teacher})
    with pytest.raises(
        InputError, match=r"student \(ModuleDict\) holds several detectors \(small, large\); pass the one"
    ):
        attach(both, detector(small_spec(), seed=3))
    with attach(student, nn.ModuleDict({"one": teacher, "two": copy.deepcopy(teacher)}), neck="backbone",
                teacher_neck="two.backbone"):  # fmt: skip
        assert "loss_pkd" in student(images, targets)


def test_a_neck_that_never_runs_is_named(student, teacher, images, targets):
    student.spare = Levels()
    with attach(student, teacher, neck="spare", teacher_neck="backbone"):
        with pytest.raises(InputError, match=r"\(FasterRCNN\) did not call its Levels in training mode"):
            student(images, targets)


def test_what_is_no_detector_is_refused(student, teacher):
    for given in (None, "student", {"model": student}, 3):
        with pytest.raises(InputError, match=r"the student is (None|a str|a dict|a int); pass a detector"):
            attach(given, teacher)
        with pytest.raises(InputError, match="the teacher is "):
            attach(student, given)
    for neck, kind in ((3, "int"), (student.backbone, "BackboneWithFPN|Pyramid")):
        with pytest.raises(InputError, match=f"^neck is a ({kind}); pass a dotted name"):
            attach(student, teacher, neck=neck)


def test_a_module_that_holds_both_is_refused_and_the_student_in_it_is_not(student, teacher, images, targets):
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    with pytest.raises(InputError, match=r"student \(ModuleDict\) holds the other .*the detector in it that is meant"):
        attach(both, teacher)
    with attach(both["student"], teacher):
        assert student(images, targets)["loss_pkd"] > 0


def test_a_copy_that_data_parallel_makes_has_no_teacher_and_says_so(student, teacher, images, targets):
    with attach(student, teacher):
        replica = student._replicate_for_data_parallel()
        with pytest.raises(InputError, match="a copy that DataParallel made"):
            replica(images, targets)


def test_a_teacher_that_is_compiled_as_a_whole_says_that_it_runs_uncompiled(student, teacher, images, targets):
    with pytest.warns(Notice, match=r"compiled as a whole, and runs uncompiled: .*teacher\.backbone\.compile"):
        attach(student, torch.compile(teacher, backend="eager")).remove()
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return lambda *args: calls.append(1) or graph(*args)

    with attach(student, teacher):
        torch.manual_seed(0)
        expected = student(images, targets)["loss_pkd"].item()
    teacher.backbone = torch.compile(teacher.backbone, backend=backend)
    student.backbone.eval()
    with attach(student, teacher):
        torch.manual_seed(0)
        student(images, targets)
    assert calls, "a compiled backbone runs compiled"
    assert expected > 0


@pytest.mark.parametrize("order", [("pixel_values", "pixel_mask", "labels"), ("labels", "pixel_mask", "pixel_values")])
def test_images_and_masks_are_found_in_any_order_and_the_mask_reaches_the_teacher(order):
    student, teacher = HuggingFace().train(), HuggingFace(1)
    photographs = [torch.rand(3, 24, 32) * 255, torch.rand(3, 32, 24) * 255]
    batch = Processor()(photographs) | {"labels": []}
    with attach(student, teacher) as handle:
        student(**{name: batch[name] for name in order})
    assert list(handle.losses) == [4, 8]
    assert torch.equal(teacher.model.backbone.mask, batch["pixel_mask"])
    assert teacher.model.backbone.images.data_ptr() == batch["pixel_values"].data_ptr()


class MaskFirst(Plain):
    """Its backbone is called with the mask before the images, both by place, and its levels are nested."""

    class Backbone(Levels):
        def forward(self, mask: Tensor, pictures: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
            return [(level, mask) for level in super().forward(pictures)], mask

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.backbone = MaskFirst.Backbone(seed)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        levels, _ = self.backbone(torch.ones(inputs[:, 0].shape), inputs)
        self.levels = [level for level, _ in levels]
        return {"loss_box": head_loss(self.levels)}


def test_positional_masks_and_nested_levels_are_understood():
    student, teacher = MaskFirst().train(), MaskFirst(1)
    with attach(student, teacher) as handle:
        student(torch.rand(2, 3, 16, 24))["loss_pkd"].backward()
    assert list(handle.losses) == [4, 8]
    assert all("PearsonLoss" in level.grad_fn.name() for level in student.levels), "the heads get the tapped levels"


def test_a_teacher_that_wants_what_the_student_was_not_given_is_refused():
    class Prompted(Plain):
        class Backbone(Levels):
            def forward(self, x: Tensor, prompt: Tensor) -> list[Tensor]:
                return super().forward(x)

        def __init__(self) -> None:
            super().__init__()
            self.backbone = Prompted.Backbone()

    student = Plain().train()
    with attach(student, Prompted()):
        with pytest.raises(InputError, match="the teacher's Backbone wants prompt beside the images"):
            student(torch.rand(1, 3, 16, 16))


def test_a_detector_without_a_backbone_is_distilled_through_the_list_of_images_that_it_takes():
    student, teacher = awake(pan_detector()), awake(pan_detector(), seed=1)
    images = [torch.rand(3, 50, 40), torch.rand(3, 64, 64)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([label])} for label in (1, 3)]
    seen = {}
    teacher.stem.register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0]))
    student.stem.register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0]))
    teacher.tower.register_forward_hook(lambda *_: pytest.fail("the teacher ran beyond its neck"))
    with attach(student.train(), teacher) as handle:
        terms = student(images, targets)
    assert list(handle.losses) == [4, 8, 16] and terms["loss_pkd"] > 0
    assert torch.equal(seen["teacher"], seen["student"])
    apart = correlations(student, teacher, [images])
    assert list(apart) == [4, 8, 16] and min(apart.values()) > 0.1
    assert correlations(student, pyramids(teacher, [images]), [images]) == pytest.approx(apart, rel=1e-5)
