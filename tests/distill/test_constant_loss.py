"""A loss from which the student learns nothing is an error, and one from which nobody wants to learn is not."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jdkd.distill import FeatureDistiller, HeadDistiller, attach
from jdkd.errors import InputError
from tests.distill.frameworks import Levels, head_loss


class Student(nn.Module):
    """Runs its backbone as ``run`` does, and has a head that learns."""

    def __init__(self, run: object = None, seed: int = 0) -> None:
        super().__init__()
        self.backbone, self.run = Levels(seed), run or (lambda backbone, x: backbone(x))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss_box": head_loss([self.head(level) for level in self.run(self.backbone, x)])}


class Detached(Levels):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [level.detach() for level in super().forward(x)]


def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()


def without(context: object) -> object:
    def run(backbone: nn.Module, x: Tensor) -> list[Tensor]:
        with context():
            levels = backbone(x)
        return [level.clone() for level in levels]

    return run


def reentrant(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    return checkpoint(lambda y: tuple(backbone(y)), x, use_reentrant=True)


@pytest.mark.parametrize("run", [reentrant, without(torch.no_grad), without(torch.inference_mode)])
def test_a_neck_that_runs_without_gradients_raises(run):
    student = Student(run).train()
    with attach(student, Student(seed=1)):
        with pytest.raises(InputError, match=r"pyramid without gradients, .* constant; .* use_reentrant=False"):
            student(images())


def test_a_pyramid_that_no_trained_parameter_reaches_raises():
    detached = Student().train()
    detached.backbone = Detached()
    frozen = Student().train()
    frozen.backbone.requires_grad_(False)
    for student in (detached, frozen):
        with attach(student, Student(seed=1)):
            with pytest.raises(InputError, match=r"pyramid .* depends on no parameter that is trained, .* a constant"):
                student(images().detach())
        with attach(student, Student(seed=1), loss_weight=0.0):
            assert student(images().detach())["loss_pkd"] == 0, "as at weight 0 nothing is to be learned"
    frozen.backbone.coarse.requires_grad_(True)
    with attach(frozen, Student(seed=1)):
        assert frozen(images().detach())["loss_pkd"].requires_grad


def test_a_forward_without_gradients_is_no_error():
    student = Student().train()
    for context in (torch.no_grad, torch.inference_mode):
        with attach(student, Student(seed=1)), context():
            assert student(images())["loss_pkd"] > 0
    with FeatureDistiller(student, Student(seed=1)) as distiller:
        with torch.no_grad():
            student(images())
        assert distiller.loss() > 0


def test_a_checkpoint_that_is_not_reentrant_has_the_gradients_of_none():
    def gradients(run: object) -> list[Tensor]:
        student = Student(run).train()
        student.load_state_dict(Student().state_dict() | {"head.weight": torch.ones(1, 4, 1, 1)}, strict=False)
        with attach(student, Student(seed=1)):
            losses = student(images())
            sum(losses.values()).backward()
        return [parameter.grad for parameter in student.backbone.parameters()]

    torch.manual_seed(0)
    plain = gradients(None)
    again = gradients(lambda backbone, x: checkpoint(lambda y: tuple(backbone(y)), x, use_reentrant=False))
    for a, b in zip(plain, again, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_the_distillers_say_it_too(student, teacher, images, targets):
    student.requires_grad_(False)
    with FeatureDistiller(student, teacher) as features, HeadDistiller(student, teacher) as head:
        student(images, targets)
        with pytest.raises(InputError, match="pyramid of the student"):
            features.loss()
        with pytest.raises(InputError, match="class logits of the student"):
            head.loss()


class Apart(nn.Module):
    """A backbone and a neck, of which ``run`` says how the neck is called."""

    def __init__(self, run: object = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.neck, self.run = nn.Conv2d(3, 4, 4, 4), Mixed(), run or (lambda neck, x: neck(x))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss_box": head_loss(self.run(self.neck, self.backbone(x)))}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        return [fine.relu(), self.coarse(fine)]


def checkpointed(module: nn.Module, x: Tensor) -> list[Tensor]:
    return checkpoint(module, x, use_reentrant=False)


def gradients(student: nn.Module, teacher: nn.Module, *batches: Tensor) -> list[Tensor]:
    """Of several forwards before one backward."""
    with attach(student.train(), teacher):
        sum(sum(student(batch).values()) for batch in batches).backward()
    return [parameter.grad for parameter in student.parameters()]


def test_a_neck_recomputed_for_an_earlier_forward_never_meets_the_teachers_view_of_a_later_one():
    batches = [images(), images().detach() ** 2]
    for batch in batches:
        ours, plain = (gradients(Apart(run), Apart(seed=1), batch) for run in (checkpointed, None))
        torch.testing.assert_close(ours, plain)
    with pytest.raises(InputError, match=r"recomputes its Mixed .* outside the checkpoint, .* backward after each"):
        gradients(Apart(checkpointed), Apart(seed=1), *batches)
    ours, plain = (gradients(Student(run), Student(seed=1), *batches) for run in (checkpointed, None))
    torch.testing.assert_close(ours, plain)  # where the images enter inside, the teacher is shown them again


def test_a_recomputed_neck_gives_no_second_loss():
    def run(neck: nn.Module, x: Tensor) -> list[Tensor]:
        return checkpoint(lambda y: [level.square() for level in neck(y)], x, use_reentrant=False)

    student = Apart(run).train()
    with FeatureDistiller(student, Apart(seed=1)) as distiller:
        terms = student(images())
        (sum(terms.values()) + distiller.loss()).backward()
        assert not distiller.has_loss
        with pytest.raises(RuntimeError, match="has not run"):
            distiller.loss()
