"""attach() where teachers are shared, put to work by others, or of another dtype, and pyramids of rarer kinds."""

from collections import defaultdict, namedtuple

import pytest
import torch
from torch import Tensor, nn

from jdkd.distill import attach
from jdkd.functional import pkd_loss
from tests.distill.test_attach import Necked

Levels = namedtuple("Levels", ["fine", "coarse"])


def in_a_list(levels: list[Tensor]) -> list[Tensor]:
    return list(levels)


class Twice(Necked):
    """Runs its neck on the images and on their mirror image."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        plain, mirrored = super().forward(inputs), super().forward(inputs.flip(-1))
        return {"loss_head": plain["loss_head"] + mirrored["loss_head"]}


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_teacher_that_a_container_puts_to_train_still_teaches_in_evaluation_mode():
    teacher = Necked(in_a_list, seed=1)
    teacher.neck.lateral[0] = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    student = Necked(in_a_list)
    both = nn.ModuleList([student, teacher])
    with attach(student, teacher):
        both.train()
        student(images())
        assert not teacher.training
    assert teacher.neck.lateral[0][1].num_batches_tracked == 0


def test_two_students_may_share_a_teacher():
    teacher, first, second = Necked(in_a_list, seed=2), Necked(in_a_list), Necked(in_a_list, seed=1)
    one, two = attach(first, teacher), attach(second, teacher)
    one.remove()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert "loss_pkd" in second(images())
    two.remove()
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


def test_a_neck_that_runs_twice_is_taught_twice():
    student, teacher = Twice(in_a_list), Necked(in_a_list, seed=1)
    expected = sum(pkd_loss(student.levels(x), teacher.levels(x), 6.0) for x in (images(), images().flip(-1)))
    with attach(student, teacher, loss_weight=6.0) as handle:
        for _ in range(2):  # nothing is left over from the step before
            losses = student(images())
            torch.testing.assert_close(losses["loss_pkd"], expected)
            torch.testing.assert_close(sum(handle.losses.values()), expected.detach())
    losses["loss_pkd"].backward()


@pytest.mark.parametrize(
    "kind", [lambda levels: Levels(*levels), lambda levels: defaultdict(list, zip("ab", levels, strict=True))]
)
def test_named_tuples_and_dicts_with_defaults_keep_their_type(kind):
    student, teacher = Necked(kind), Necked(kind, seed=1)
    seen = []
    student.neck.register_forward_hook(lambda module, given, pyramid: seen.append(pyramid))
    with attach(student, teacher):
        hooks = student.neck._forward_hooks
        hooks.move_to_end(next(iter(hooks)))  # look at what the heads get
        student(images())["loss_pkd"].backward()
    assert type(seen[0]) is type(kind([torch.zeros(1), torch.zeros(1)]))
    assert "PearsonLoss" in next(iter(seen[0].values() if isinstance(seen[0], dict) else seen[0])).grad_fn.name()


def test_a_teacher_of_another_dtype_is_shown_its_own():
    student, teacher = Necked(in_a_list), Necked(in_a_list, seed=1)
    expected = pkd_loss(student.levels(images()), teacher.levels(images()), 6.0)
    with attach(student, teacher.bfloat16()):
        loss = student(images())["loss_pkd"]
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


def test_levels_may_come_from_a_generator():
    student, teacher = Necked(in_a_list), Necked(in_a_list, seed=1)
    with attach(student, teacher, levels=(stride for stride in (8,))) as handle:
        for _ in range(2):
            student(images())
            assert list(handle.losses) == [8]
