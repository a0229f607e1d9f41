"""Detectors of every family, and one of nobody's, learn under a teacher of another make."""

import pytest
import torch
from torch import nn

from jdkd.detect import FAMILIES, detector, read
from jdkd.distill import attach
from jdkd.rewrite import Rewrite
from tests.graph.networks import pan_detector

TAUGHT = (*FAMILIES, "pan")
CUT = ("fasterrcnn_v2", "maskrcnn_v2", "retinanet_v2")  # in half before; the others are in tests/rewrite, tests/detect
UNEQUAL = ("ssd", "ssdlite", "pan")  # whose levels are of other widths than the teacher's
SIZE = {"min_size": 64, "max_size": 64}
IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
TARGET = {
    "boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]),
    "labels": torch.tensor([1]),
    "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
}


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "pan":
        return pan_detector(classes=2)
    head = {"box_head": 32} if "rcnn" in family else {}
    return detector(family, "mobilenet_v3_small", 2, channels=32, **SIZE, **head)


@pytest.fixture(scope="module")
def teacher():
    return made("fasterrcnn")


@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")  # levels that the other has not
@pytest.mark.parametrize("family", TAUGHT)
def test_a_detector_of_any_family_learns_under_a_teacher_of_another(family, teacher):
    student = made(family)
    if family in CUT:
        whole = sum(p.numel() for p in student.parameters())
        topology = read(student)
        pyramid = {name for level in topology.followed for name, _ in level}
        cut = {group.name: range(0, group.units, 2) for group in topology.groups if group.name not in pyramid}
        student = Rewrite(keep=cut).apply(student, topology)
        assert sum(p.numel() for p in student.parameters()) < 0.6 * whole
    says = {"student_normalisation": "same"} if family == "pan" else {}
    with attach(student.train(), teacher, adapter=family in UNEQUAL, **says) as handle:
        if family in UNEQUAL:
            handle.calibrate([(IMAGES, [TARGET] * 2)])
        losses = student(IMAGES, [TARGET] * 2)
        losses["loss_pkd"].backward()
        assert len(handle.losses) >= 2 and 0 < losses["loss_pkd"] < torch.inf
    assert all(map(torch.isfinite, losses.values()))
    reached = [p for p in student.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) >= 10 and all(parameter.grad is None for parameter in teacher.parameters())
