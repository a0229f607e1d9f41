"""What a teacher's backbone gets is what the teacher by itself would make of the same photographs."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jdkd.distill import Normalisation, attach, correlations
from jdkd.distill.normalisation import normalisation_from
from jdkd.errors import InputError
from tests.distill.frameworks import BGR_MEAN, Detectron, HuggingFace, Levels, OpenMMLab, Plain, Processor, head_loss
from tests.distill.frameworks import padded as padded_batch

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Own = Callable[[nn.Module, list[Tensor]], Tensor]


class TorchVision(nn.Module):
    def __init__(self, mean: list[float] = IMAGENET[0], std: list[float] = IMAGENET[1], size: int = 24) -> None:
        super().__init__()
        self.backbone = Levels(1)
        self.transform = GeneralizedRCNNTransform(size, 64, mean, std, size_divisible=8)

    def forward(self, images: list[Tensor], targets: object = None) -> dict[str, Tensor]:
        images, _ = self.transform(images)
        return {"loss_box": head_loss(self.backbone(images.tensors))}


def photographs(sizes: tuple[tuple[int, int], ...] = ((24, 32), (32, 24))) -> list[Tensor]:
    """RGB, whole numbers of 0..255."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (3, *size), generator=generator).float() for size in sizes]


def plain_with(**attributes: object) -> Plain:
    model = Plain()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_timm(mean: object, std: object) -> Plain:
    model = Plain()
    model.backbone.pretrained_cfg = {"mean": mean, "std": std, "input_size": (3, 224, 224)}
    return model


def scaled(mean: list[float], std: list[float], white: float = 1.0, order: str = "rgb") -> Own:
    def own(model: nn.Module, images: list[Tensor]) -> Tensor:
        images = [image.flip(0) if order == "bgr" else image for image in images]
        m, s = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        return padded_batch([(image * (white / 255) - m) / s for image in images])

    return own


def processed(model: nn.Module, images: list[Tensor]) -> Tensor:
    return model.image_processor(images)["pixel_values"]


ODD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
TEACHERS: dict[str, tuple[Callable[[], nn.Module], Own]] = {
    "torchvision": (
        lambda: TorchVision(*ODD),
        lambda model, images: model.transform([image / 255 for image in images])[0].tensors,
    ),
    "torchvision, nothing subtracted": (
        lambda: TorchVision([0.0] * 3, [1.0] * 3),
        lambda model, images: model.transform([image / 255 for image in images])[0].tensors,
    ),
    "OpenMMLab": (lambda: OpenMMLab(), lambda m, images: m.data_preprocessor([i.flip(0) for i in images])),
    "OpenMMLab, caffe": (
        lambda: OpenMMLab(BGR_MEAN, (1.0, 1.0, 1.0), False),
        lambda model, images: model.data_preprocessor([image.flip(0) for image in images]),
    ),
    "OpenMMLab, not normalised": (
        lambda: OpenMMLab(None, None, False),
        lambda model, images: model.data_preprocessor([image.flip(0) for image in images]),
    ),
    "OpenMMLab, divided by 255": (
        lambda: OpenMMLab((0.0,) * 3, (255.0,) * 3, True),
        lambda model, images: model.data_preprocessor([image.flip(0) for image in images]),
    ),
    "a home-made data_preprocessor": (
        lambda: plain_with(data_preprocessor=SimpleNamespace(mean=[120.0] * 3, std=[1.0] * 3)),
        scaled([120.0] * 3, [1.0] * 3, 255),
    ),
    "detectron2": (lambda: Detectron(), lambda m, images: m.preprocess_image([i.flip(0) for i in images])),
    "detectron2, RGB": (
        lambda: Detectron((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "RGB"),
        lambda model, images: model.preprocess_image(images),
    ),
    "pixel_mean of RGB, unsaid": (
        lambda: Detectron((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), None),
        lambda model, images: model.preprocess_image(images),
    ),
    "Hugging Face": (lambda: plain_with(image_processor=Processor()), processed),
    "Hugging Face, rescaled only": (lambda: plain_with(image_processor=Processor(do_normalize=False)), processed),
    "Hugging Face, BGR": (lambda: plain_with(image_processor=Processor(do_flip_channel_order=True)), processed),
    "Hugging Face, not rescaled": (
        lambda: plain_with(image_processor=Processor((128.0,) * 3, (64.0,) * 3, do_rescale=False)),
        processed,
    ),
    "Hugging Face, in another": (
        lambda: plain_with(processor=SimpleNamespace(image_processor=Processor())),
        lambda model, images: model.processor.image_processor(images)["pixel_values"],
    ),
    "timm": (lambda: with_timm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), scaled([0.5] * 3, [0.5] * 3)),
    "image_mean": (lambda: plain_with(image_mean=torch.tensor(ODD[0]), image_std=torch.tensor(ODD[1])), scaled(*ODD)),
    "buffers": (
        lambda: plain_with(mean=torch.tensor(ODD[0]).view(1, 3, 1, 1), std=torch.tensor(ODD[1]).view(1, 3, 1, 1)),
        scaled(*ODD),
    ),
    "a normalize module": (lambda: plain_with(normalize=SimpleNamespace(mean=ODD[0], std=ODD[1])), scaled(*ODD)),
    "a composition": (
        lambda: plain_with(transform=SimpleNamespace(transforms=[object(), SimpleNamespace(mean=ODD[0], std=ODD[1])])),
        scaled(*ODD),
    ),
}


BLACK_IS_ZERO = ("OpenMMLab, not normalised", "OpenMMLab, divided by 255", "Hugging Face, rescaled only")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_of_any_framework_sees_what_it_would_make_of_a_torchvision_students_images(name):
    build, own = TEACHERS[name]
    student, teacher, images = TorchVision([0.4, 0.45, 0.5], [0.3, 0.25, 0.2]).train(), build(), photographs()
    with attach(student, teacher):
        student([image / 255 for image in images])
    expected = own(teacher, images)
    assert expected.shape == (2, 3, 32, 32)
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=1e-4, atol=1e-4)
    assert (expected - student.backbone.images).abs().max() > 0.1, "the two must differ for this to mean anything"


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_of_any_framework_gives_a_torchvision_teacher_its_own(name):
    build, own = TEACHERS[name]
    student, teacher, images = build().train(), TorchVision(), photographs()
    given = own(student, images)
    with attach(student, teacher):
        if name == "torchvision, nothing subtracted" or name == "torchvision":
            student([image / 255 for image in images])
        elif isinstance(student, Detectron):
            turned = student.input_format != "BGR"
            student([{"image": image if turned else image.flip(0)} for image in images])
        else:
            student(given)
    expected = teacher.transform([image / 255 for image in images])[0].tensors
    if name in BLACK_IS_ZERO:  # and padding cannot be told from it
        expected = teacher.backbone.images.clone()
        right = teacher.transform([image / 255 for image in images])[0].tensors
        expected[0, :, :24], expected[1, :, :, :24] = right[0, :, :24], right[1, :, :, :24]
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=1e-4, atol=1e-4)


def test_padding_is_zero_for_the_teacher_where_a_transform_or_a_mask_tells_it_from_black():
    images = photographs()
    student, teacher = TorchVision([0.0] * 3, [1.0] * 3).train(), TorchVision()
    with attach(student, teacher):
        student([image / 255 for image in images])
    expected = teacher.transform([image / 255 for image in images])[0].tensors
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=1e-4, atol=1e-4)
    student, batch = HuggingFace().train(), Processor(do_normalize=False)(images)
    with attach(student, teacher, student_normalisation=Processor(do_normalize=False)):
        student(**batch, labels=[])
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=1e-4, atol=1e-4)


def test_two_that_normalise_alike_share_the_batch():
    student, teacher = OpenMMLab().train(), OpenMMLab(seed=1)
    batch = student.data_preprocessor(photographs())
    with attach(student, teacher):
        student(batch)
    assert teacher.backbone.images.data_ptr() == batch.data_ptr()
    for student, teacher in ((Plain().train(), Plain(1)), (OpenMMLab().train(), TorchVision())):
        with attach(student, teacher):
            student(batch)
        assert teacher.backbone.images.data_ptr() == batch.data_ptr()


def test_one_that_says_nothing_beside_one_that_does_is_refused_with_the_argument_that_mends_it():
    known, unknown = TorchVision().train(), Plain().train()
    with pytest.raises(
        InputError, match=r"student \(TorchVision\) .*mean \[0.485.* of the teacher|teacher_normalisation"
    ):
        attach(known, unknown)
    with pytest.raises(InputError, match=r"nothing on the student \(Plain\) .* pass student_normalisation=\(mean, std"):
        attach(unknown, known)
    with pytest.raises(InputError, match="nothing on the teacher"):
        correlations(known, unknown, [photographs()])


GIVEN = {
    "a pair": (ODD, scaled(*ODD)),
    "all four": (
        ([120.0, 110.0, 100.0], [50.0, 60.0, 70.0], 255, "BGR"),
        scaled([120.0, 110.0, 100.0], [50.0, 60.0, 70.0], 255, "bgr"),
    ),
    "one number": ((0.5, 0.5), scaled([0.5] * 3, [0.5] * 3)),
    "a dict": ({"mean": [127.5] * 3, "std": [127.5] * 3}, scaled([127.5] * 3, [127.5] * 3, 255)),
    "a processor": (Processor(), lambda model, images: Processor()(images)["pixel_values"]),
    "a transform": (SimpleNamespace(mean=ODD[0], std=ODD[1]), scaled(*ODD)),
    "a Normalisation": (Normalisation(*ODD), scaled(*ODD)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_normalisation_may_be_given_and_outweighs_what_the_model_says(name):
    given, own = GIVEN[name]
    for teacher in (Plain(), OpenMMLab()):
        student, images = TorchVision().train(), photographs()
        with attach(student, teacher, teacher_normalisation=given):
            student([image / 255 for image in images])
        torch.testing.assert_close(teacher.backbone.images, own(teacher, images), rtol=1e-4, atol=1e-4)
    with attach(student, teacher, teacher_normalisation="same"):
        student([image / 255 for image in images])
    assert teacher.backbone.images.data_ptr() == student.backbone.images.data_ptr()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("imagenet", "teacher_normalisation is 'imagenet'; pass"),
        ((0.5,), r"teacher_normalisation is \(0.5,\)"),
        (3, "teacher_normalisation is 3"),
        ({"mean": 1, "std": 2, "channels": "bgr"}, "teacher_normalisation is {'mean'"),
        ((0.5, 0.0), "std 0.0; give a finite number a channel for each, and std above 0"),
        ((float("nan"), 1.0), "mean nan"),
        (([0.5] * 2, [0.5] * 3), "give a finite number a channel"),
        ((0.5, 0.5, 1, "hsv"), "channel order 'hsv'; choose one of rgb, bgr"),
        ((0.5, 0.5, -1), "scale -1; give what a white pixel is, 1 or 255"),
        (([0.1, 0.2], [0.3, 0.4]), "give both as many channels"),
    ],
)
def test_what_is_no_normalisation_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        attach(TorchVision(), Plain(), teacher_normalisation=given)


def test_one_that_normalises_twice_is_refused():
    teacher = nn.Module()
    teacher.model, teacher.image_mean, teacher.image_std = TorchVision(), [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match=r"teacher normalises images in more than one place: .*pass teacher_normalis"):
        attach(TorchVision(), teacher)
    teacher.image_mean, teacher.image_std = IMAGENET
    with attach(TorchVision(), teacher):
        pass


def test_a_torchvision_teacher_is_neither_resized_nor_normalised_again_on_the_way_to_a_neck_beside_its_backbone():
    class Beside(TorchVision):
        def __init__(self) -> None:
            super().__init__(*ODD, size=800)
            self.neck = nn.Identity()

        def forward(self, images: list[Tensor], targets: object = None) -> dict[str, Tensor]:
            images, _ = self.transform(images)
            return {"loss_box": head_loss(self.neck(self.backbone(images.tensors)))}

    student, teacher, images = TorchVision().train(), Beside(), photographs()
    with attach(student, teacher, neck="backbone", teacher_neck="neck"):
        student([image / 255 for image in images])
    expected = scaled(*ODD)(teacher, images)
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_images_are_converted_in_single():
    student, images = OpenMMLab().train().bfloat16(), photographs()
    teacher = TorchVision()
    with attach(student, teacher):
        student(student.data_preprocessor([image.flip(0) for image in images]).bfloat16())
    expected = teacher.transform([image / 255 for image in images])[0].tensors
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=0.02, atol=0.02)
    assert teacher.backbone.images.dtype == torch.float32


def test_correlations_convert_too():
    student, images = TorchVision(), photographs()
    teacher = TorchVision(*ODD)
    teacher.backbone.load_state_dict(copy.deepcopy(student.backbone.state_dict()))
    correlations(student, teacher, [[image / 255 for image in images]])
    expected = teacher.eval().transform([image / 255 for image in images])[0].tensors
    torch.testing.assert_close(teacher.backbone.images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["first of a sequence", "a child of any name", "within a sequence of its own"])
def test_a_normalisation_that_a_model_applies_first_is_found_wherever_it_is(name):
    """Neither has a parameter, and the teacher's backbone gets what its own first step would make of the images."""
    step = transforms.Normalize(*ODD)
    teacher = Plain(1)
    if name == "first of a sequence":
        teacher = nn.Sequential(step, teacher)
    elif name == "a child of any name":
        teacher.first = step
    else:
        teacher.first = nn.Sequential(transforms.CenterCrop(16), step)
    backbone, images = (
        (teacher[1] if isinstance(teacher, nn.Sequential) else teacher).backbone,
        torch.rand(2, 3, 16, 16),
    )
    student = Plain().train()
    with pytest.raises(InputError, match="pass student_normalisation"):
        attach(student, teacher)
    with attach(student, teacher, student_normalisation=([0.0] * 3, [1.0] * 3)):
        student(images)
    torch.testing.assert_close(backbone.images, step(images))


def test_a_child_with_a_mean_that_is_of_no_colours_says_nothing_of_images():
    with attach(Plain(), plain_with(boxes=transforms.Normalize([0.0] * 4, [0.1, 0.1, 0.2, 0.2]))):
        pass


def test_an_image_processor_that_rescales_by_a_factor_of_its_own_and_shifts():
    """As EfficientNet's does: to -1..1, and normalised then."""
    given = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_rescale": True, "do_normalize": True}
    shifts = SimpleNamespace(**given, rescale_factor=1 / 127.5, rescale_offset=True)
    assert normalisation_from(shifts, "student").equals(Normalisation((1.5,), (0.25,), 2.0))
    scales = SimpleNamespace(**given, rescale_factor=1 / 127.5)
    assert normalisation_from(scales, "student").equals(Normalisation((0.5,), (0.25,), 2.0))
