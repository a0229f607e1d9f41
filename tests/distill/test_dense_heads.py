"""Head distillation of the other families: every anchor's classes, or the regions of a detector with masks."""

import copy
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

import jdkd.detect
from jdkd.detect.heads import class_head
from jdkd.distill import DistillConfig, Distiller, HeadDistiller, can_distil_heads, comparable
from jdkd.errors import InputError
from tests.detectors import detector, small_spec

SIZE = {"min_size": 64, "max_size": 64}


class Backbone(nn.Module):
    """Two levels, at stride 8 and 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = width
        self.fine, self.coarse = nn.Conv2d(3, width, 8, 8), nn.Conv2d(width, width, 2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"0": fine, "1": self.coarse(fine)}


def anchors(ratios: tuple[float, ...] = (1.0,)) -> AnchorGenerator:
    return AnchorGenerator(((16,), (32,)), (ratios,) * 2)


def boxes() -> DefaultBoxGenerator:
    return DefaultBoxGenerator([[2], [2]])


def retinanet(width: int, classes: int = 4, ratios: tuple[float, ...] = (0.5, 1.0)) -> RetinaNet:
    return RetinaNet(Backbone(width), classes, anchor_generator=anchors(ratios), **SIZE)


def fcos(width: int, classes: int = 4) -> FCOS:
    return FCOS(Backbone(2 * width), classes, anchor_generator=anchors(), **SIZE)  # GroupNorm(32) in its towers


def ssd(width: int, classes: int = 4) -> SSD:
    head = SSDHead([width] * 2, [4, 4], classes)
    return SSD(Backbone(width), boxes(), (64, 64), classes, head=head)


def ssdlite(width: int, classes: int = 4) -> SSD:
    head = SSDLiteHead([width] * 2, [4, 4], classes, nn.BatchNorm2d)
    return SSD(Backbone(width), boxes(), (64, 64), classes, head=head)


def masked(width: int, classes: int = 4) -> MaskRCNN:
    pools = {f"{what}_roi_pool": MultiScaleRoIAlign(["0", "1"], size, 2) for what, size in (("box", 7), ("mask", 14))}
    return MaskRCNN(Backbone(width), classes, rpn_anchor_generator=anchors(), **pools, **SIZE)


DENSE = {"retinanet": retinanet, "fcos": fcos, "ssd": ssd, "ssdlite": ssdlite}


def seeded(make, width: int, seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    return make(width, **options)


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.fixture
def targets() -> list[dict[str, Tensor]]:
    box = torch.tensor([[4.0, 4.0, 40.0, 44.0]])
    return [{"boxes": box, "labels": torch.tensor([k]), "masks": torch.ones(1, 64, 64)} for k in (1, 3)]


def expected(ours: Tensor, theirs: Tensor, focal: bool) -> Tensor:
    """By the definition, in float64; divided by the anchors on which the teacher sees an object."""
    ours, theirs = ours.double(), theirs.double()
    if focal:
        p, q = theirs.sigmoid(), ours.sigmoid()
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return divergence.sum() / p.amax(-1).sum().clamp(min=1)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    return (p * (p / q).log()).sum() / (1 - p[..., 0]).sum().clamp(min=1)


@pytest.mark.parametrize("family", DENSE)
def test_the_classes_of_every_anchor_are_compared(family, images, targets):
    student, teacher = seeded(DENSE[family], 32, 0).train(), seeded(DENSE[family], 64, 1).eval()
    assert can_distil_heads(student, teacher)
    with torch.no_grad():  # fresh ones say nearly the same of everything
        for model in (student, teacher):
            for weight in model.head.classification_head.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    seen = {}
    with Distiller(student, teacher, feature_weight=0, head_weight=2.0) as distiller:
        student.backbone.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0]))
        student.head.register_forward_hook(lambda _, inputs, output: seen.update(ours=output["cls_logits"]))
        student(images, targets)
        loss = distiller.loss()
        loss.backward()
    with torch.no_grad():
        theirs = teacher.head(list(teacher.backbone(seen["x"]).values()))["cls_logits"]
    focal = family in ("retinanet", "fcos")
    assert loss.item() == pytest.approx(2 * expected(seen["ours"], theirs, focal).item(), rel=1e-3) and loss > 0
    assert student.backbone.fine.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_sees_next_to_nothing_counts_as_one_object(images, targets):
    student, teacher = seeded(retinanet, 16, 0).train(), seeded(retinanet, 16, 1).eval()
    torch.nn.init.constant_(teacher.head.classification_head.cls_logits.bias, -12.0)
    with HeadDistiller(student, teacher) as distiller, torch.no_grad():
        student(images, targets)
        ours, loss = distiller._logits.double(), distiller.loss()
    p, q = torch.full_like(ours, -12.0).sigmoid(), ours.sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert loss.item() == pytest.approx(divergence.sum().item(), rel=0.02) and p.amax(-1).sum() < 0.1


@pytest.mark.parametrize("make", [retinanet, ssd])
def test_a_teacher_that_agrees_costs_nothing(make, images, targets):
    student = seeded(make, 32, 0).train()
    with HeadDistiller(student, copy.deepcopy(student)) as distiller:
        student(images, targets)
        assert distiller.loss().item() == pytest.approx(0, abs=1e-4)


def test_a_detector_with_masks_is_distilled_as_any_of_two_stages(images, targets):
    student, teacher = seeded(masked, 16, 0).train(), seeded(masked, 24, 1)
    with HeadDistiller(student, teacher) as distiller:
        student(images, targets)
        assert distiller.loss() > 0
    assert can_distil_heads(detector(small_spec()), teacher), "of the same classes, whatever else it does"


OTHERS = {
    "other classes": (lambda: retinanet(16, classes=6), "the student knows 3 classes and the teacher 5"),
    "other anchors": (lambda: retinanet(16, ratios=(1.0, 2.0)), "cannot be compared: their anchors differ"),
    "more anchors": (lambda: retinanet(16, ratios=(0.5, 1.0, 2.0)), "cannot be compared: their anchors differ"),
    "softmax": (lambda: ssd(16), "one has a softmax over its classes and the other a sigmoid for each"),
    "two stages": (lambda: masked(16), "one classifies anchors and the other regions"),
    "none": (lambda: nn.Sequential(Backbone(16)), r"the teacher \(Sequential\) has no head"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_heads_that_do_not_speak_of_the_same_are_refused(name):
    student, (make, message) = retinanet(16), OTHERS[name]
    teacher = make()
    with pytest.raises(InputError, match=f"{message}.*; distil the features only"):
        HeadDistiller(student, teacher)
    assert not can_distil_heads(student, teacher)


ALIKE = (("fcos", "reppoints"), ("atss", "gfl"), ("retinanet",))  # families whose places stand for the same objects
FAMILIES = [family for alike in ALIKE for family in alike]


@pytest.fixture(scope="module")
def families():
    """A student and a teacher of each."""

    def made(family: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return jdkd.detect.detector(family, "resnet18", ("a", "b", "c"), channels=32, **SIZE)

    return {family: (made(family, 0).train(), made(family, 1)) for family in FAMILIES}


@pytest.mark.parametrize("pair", [*permutations(ALIKE[0], 2), *permutations(ALIKE[1], 2), ("reppoints",) * 2], ids=str)
def test_families_of_the_same_places_teach_each_others_classes(pair, families, images, targets):
    student, teacher = families[pair[0]][0], families[pair[1]][1]
    student.zero_grad()
    distiller, levels = comparable(student, teacher, (images, targets), DistillConfig("pkd+logits"))
    with distiller:
        student(images, targets)
        losses = distiller.losses()
    losses["loss_head_kd"].backward()
    assert losses.keys() == {"loss_pkd", "loss_head_kd"} and levels
    assert 0 < losses["loss_head_kd"] < torch.inf and 0 < losses["loss_pkd"] < torch.inf
    assert student.backbone.fpn.inner_blocks[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ours", FAMILIES)
def test_families_of_other_places_are_refused_with_what_these_are(ours, families):
    others = [theirs for alike in ALIKE if ours not in alike for theirs in alike]
    for theirs in others:
        with pytest.raises(InputError, match=r"anchors differ.* \(\d a place of .* pixels.*, and \d a .*; distil"):
            HeadDistiller(families[ours][0], families[theirs][1])


def test_levels_of_other_strides_are_named(images, targets):
    student, teacher = retinanet(16).train(), retinanet(16)
    teacher.backbone.coarse = nn.Conv2d(16, 16, 4, 4)
    with HeadDistiller(student, teacher) as distiller:
        student(images, targets)
        with pytest.raises(InputError, match="the student classifies 320 anchors of a batch and the teacher 272"):
            distiller.loss()


def test_the_head_of_a_wrapped_detector_is_found():
    for wrapped in (nn.Sequential(ssd(16)), nn.DataParallel(ssd(16))):
        head = class_head(wrapped)
        assert head.outputs == 4 and head.exclusive and head.dense
    assert class_head(Backbone(8)) is None
