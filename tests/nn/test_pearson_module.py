"""The Pearson loss as a module."""

import torch

from jdkd.functional import pkd_loss
from jdkd.nn import PKDLoss


def test_the_module_is_the_function():
    torch.manual_seed(0)
    students, teachers = torch.randn(2, 2, 4, 6, 6).unbind(), torch.randn(2, 2, 4, 3, 3).unbind()
    for resize_stu in (True, False):
        module = PKDLoss(loss_weight=6.0, resize_stu=resize_stu)
        assert torch.equal(module(students, teachers), pkd_loss(students, teachers, 6.0, resize_stu))


def test_the_module_adds_nothing_to_a_model():
    module = PKDLoss(6.0)
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == "PKDLoss(loss_weight=6.0, resize_stu=True)"


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
