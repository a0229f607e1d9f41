"""The Pearson loss as a module."""

import pytest
import torch

from jdkd.functional import dist_loss, pearson_tap, pkd_loss
from jdkd.nn import DISTLoss, PearsonTap, PKDLoss


def test_the_module_is_the_function():
    torch.manual_seed(0)
    students, teachers = torch.randn(2, 2, 4, 6, 6).unbind(), torch.randn(2, 2, 4, 3, 3).unbind()
    for resize_stu in (True, False):
        module = PKDLoss(loss_weight=6.0, resize_stu=resize_stu)
        assert torch.equal(module(students, teachers), pkd_loss(students, teachers, 6.0, resize_stu))


def test_options_reach_the_function():
    torch.manual_seed(0)
    students, teachers = torch.randn(2, 2, 4, 6, 6).unbind()
    mask = torch.rand(2, 6, 6) > 0.4
    options = {"statistics": "instance", "zero_variance": "skip", "level_weights": [0.5], "return_levels": True}
    ours, theirs = (
        PKDLoss(6.0, **options)(students, teachers, mask),
        pkd_loss(students, teachers, 6.0, mask=mask, **options),
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = (
        PearsonTap(6.0, levels=[0])([students], [teachers]),
        pearson_tap([students], [teachers], 6.0, levels=[0]),
    )
    assert torch.equal(ours[0][0], students) and torch.equal(ours[1], theirs[1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'levelz'"):
        PKDLoss(levelz=[0])


def test_dist_is_the_function():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5).unbind()
    assert torch.equal(DISTLoss(2.0, 0.5, tau=4.0)(student, teacher), dist_loss(student, teacher, 2.0, 0.5, 4.0))
    assert repr(DISTLoss()) == "DISTLoss(inter_loss_weight=1.0, intra_loss_weight=1.0, tau=1.0)"


def test_the_module_adds_nothing_to_a_model():
    module = PKDLoss(6.0)
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == "PKDLoss(loss_weight=6.0)"
    assert repr(PKDLoss(resize_stu=False, pairing="stride")) == (
        "PKDLoss(loss_weight=1.0, pairing='stride', resize_stu=False)"
    )


def test_it_trains_a_student_to_the_teacher_whatever_their_scales():
    torch.manual_seed(0)
    image, teacher = torch.randn(4, 3, 8, 8), torch.nn.Conv2d(3, 5, 3)
    student = torch.nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        target = 40 * teacher(image) + 7
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    loss_of = PKDLoss()
    before = loss_of(student(image), target).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(student(image), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 < before
