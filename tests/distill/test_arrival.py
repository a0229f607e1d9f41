"""What a detector really does to its images, against what it says: a teacher is fed as it was trained, or refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.detect import adopt
from jdkd.distill import attach, correlations
from jdkd.distill.arrival import COLOUR, arrival
from jdkd.distill.route import route_of
from jdkd.errors import InputError
from jdkd.notices import Notice
from tests.distill.frameworks import Detectron, HuggingFace, OpenMMLab, Plain, Processor, Ultralytics, head_loss
from tests.distill.test_normalisation import ODD, TorchVision, photographs


class InCode(Plain):
    """Normalises in its forward, by numbers that nothing shows."""

    def __init__(self, mean: float = 0.5, std: float = 0.25, seed: int = 0, flips: bool = False) -> None:
        super().__init__(seed)
        self.how = mean, std, flips

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        mean, std, flips = self.how
        inputs = inputs.flip(1) if flips else inputs
        return super().forward((inputs - mean) / std)


class Letterboxed(Plain):
    """As YOLOX's, which resizes in its forward (mmrazor#184): a padded square, and nothing done to the colours."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return super().forward(F.pad(F.interpolate(inputs, (32, 32)), (0, 8, 0, 0), value=114 / 255))


def test_what_arrives_is_read_off_every_kind_of_detector():
    for model, expected in (
        (TorchVision(*ODD), [(value - m) / s for value, m, s in zip(COLOUR, *ODD, strict=True)]),
        (Detectron((1.0, 2.0, 3.0), (2.0, 2.0, 2.0)), [(v - m) / 2 for v, m in zip(COLOUR, (1, 2, 3), strict=True)]),
        (InCode(0.5, 0.5, flips=True), [0.6, 0.0, -0.6]),
        (Letterboxed(), COLOUR),
        (OpenMMLab(), COLOUR),
        (HuggingFace(), COLOUR),
        (nn.Sequential(nn.Upsample(scale_factor=2), Plain()).half(), COLOUR),
    ):
        model.train()
        modes = [module.training for module in model.modules()]
        hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
        assert arrival(route_of(model, "teacher")) == pytest.approx(expected, abs=1e-3)
        assert [module.training for module in model.modules()] == modes
        assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
        assert all(not hasattr(module, "images") for module in model.modules()), "no backbone ran"


@pytest.mark.parametrize("teacher", [InCode(), InCode(0, 1, flips=True), InCode(0, 1 / 255)])
def test_a_teacher_that_normalises_in_code_is_refused_with_what_it_was_seen_to_do(teacher):
    with pytest.raises(
        InputError, match=r"teacher \(InCode\) changes its images .*\[0\.2, 0\.5, 0\.8\] to \[.*\(Plain\) to"
    ):
        attach(Plain(1).train(), teacher)
    given = ([0.5], [0.25])
    student, batch = Plain(1).train(), torch.rand(2, 3, 16, 24)
    with attach(student, teacher, student_normalisation=([0.0], [1.0]), teacher_normalisation=given):
        student(batch)
    torch.testing.assert_close(teacher.backbone.images, (batch - 0.5) / 0.25)
    with attach(student, teacher, teacher_normalisation="same"):
        student(batch)
    assert torch.equal(teacher.backbone.images, batch)


def test_two_that_do_the_same_in_code_share_what_it_makes():
    student, teacher, batch = InCode().train(), InCode(seed=1), torch.rand(2, 3, 16, 24)
    with attach(student, teacher):
        student(batch)
    torch.testing.assert_close(teacher.backbone.images, (batch - 0.5) / 0.25)


def test_one_that_does_another_thing_than_it_says_is_refused():
    teacher = InCode()
    teacher.image_processor = Processor()
    with pytest.raises(
        InputError, match=r"teacher \(InCode\) says that its images have mean .*its Processor.*\[-1\.2, 0, 1\.2\]"
    ):
        attach(TorchVision().train(), teacher)
    with attach(TorchVision().train(), teacher, teacher_normalisation=Processor()):
        pass
    with pytest.raises(
        InputError, match=r"student \(InCode\) says .* pass student_normalisation, what its backbone gets"
    ):
        attach(teacher.train(), TorchVision())


def test_a_hugging_face_model_without_its_processor_is_refused_and_with_it_sees_its_own():
    student, teacher, images = HuggingFace().train(), HuggingFace(1), photographs()
    for model in (student, teacher):
        model.main_input_name = "pixel_values"
    batch = Processor()(images)
    with pytest.raises(
        InputError, match=r"images of the student \(HuggingFaceBase\) are normalised by its image processor"
    ):
        attach(student, teacher)
    del student.main_input_name
    with pytest.raises(InputError, match=r"images of the teacher .* pass it as teacher_normalisation, or .*'same'"):
        attach(student, teacher)
    own = Processor(do_normalize=False)  # as RT-DETR's, beside DETR's
    with attach(student, teacher, student_normalisation=Processor(), teacher_normalisation=own):
        student(**batch, labels=[])
    torch.testing.assert_close(teacher.model.backbone.images, own(images)["pixel_values"], rtol=1e-4, atol=1e-4)


def test_a_teacher_of_layers_sees_rgb_in_0_to_1_as_ultralytics_trains():
    student, teacher, images = TorchVision().train(), Ultralytics(), photographs()
    with attach(student, teacher, adapter=True) as handle:
        handle.calibrate([[image / 255 for image in images]])
        student([image / 255 for image in images])
    seen = teacher.model[0].images
    torch.testing.assert_close(seen[0, :, :24], images[0] / 255, rtol=1e-4, atol=1e-4)
    assert seen[1, :, :, 24:].abs().max() == 0, "padding is 0"


def processed(model: nn.Module, images: list[Tensor]) -> Tensor:
    return Processor()([255 * image for image in images])["pixel_values"]


def test_at_its_own_size_a_teacher_normalises_for_itself_or_is_refused():
    images = [image / 255 for image in photographs()]

    class Listed(Plain):
        def forward(self, inputs: list[Tensor]) -> dict[str, Tensor]:
            return super().forward(torch.stack([image[:, :24, :24] for image in inputs]))

    student, teacher = TorchVision().train(), Listed()
    teacher.image_processor = Processor()
    with pytest.raises(
        InputError, match=r"Listed\) says .*gives its backbone \[0\.2, 0\.5, 0\.8\]; with own_size it is"
    ):
        attach(student, teacher, own_size=True)
    with pytest.raises(InputError, match="with own_size"):
        correlations(student, teacher, [images], own_size=True)
    with pytest.raises(InputError, match=r"teacher \(TorchVision\) says .*as given.* leave own_size out"):
        attach(student, TorchVision(), own_size=True, teacher_normalisation=ODD)
    inner = Plain(1)
    inner.image_processor = Processor()
    adopted = adopt(inner, losses=lambda m, i, t: m(processed(m, i)), predict=lambda m, i: m(processed(m, i)))
    with attach(student, adopted, own_size=True):
        student(images)
    torch.testing.assert_close(inner.backbone.images, processed(inner, images))


def test_a_detector_that_cannot_be_called_is_taken_at_its_word():
    class Odd(Plain):
        def forward(self, inputs: SimpleNamespace) -> dict[str, Tensor]:
            return {"loss": head_loss(self.backbone(inputs.tensors))}

    with pytest.warns(Notice, match=r"Odd gives its backbone was not checked, .*AttributeError.*taken at its word"):
        assert arrival(route_of(Odd(), "teacher")) is None
    student, teacher = Plain().train(), Odd(1)
    with attach(student, teacher):
        student(torch.rand(2, 3, 16, 24))
