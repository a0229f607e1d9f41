"""What users of the old homes of feature distillation struggled with, that has no test elsewhere.

In-place activations (mmrazor PR 446), a student whose mAP stays 0 (mmrazor 619, 456, 613), validation that runs the
teacher too, AMP where channels are aligned.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from jdkd.distill import Distiller, attach
from jdkd.distill.recall import recall_of, say_if_blind
from jdkd.errors import InputError
from jdkd.notices import Notice
from tests.detectors import detector, small_spec
from tests.distill.pyramids import Detector, batch


class InPlace(nn.Module):
    """Its levels are written to by what follows, in the backbone and in the head."""

    def __init__(self, seed: int = 0, *, inplace: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = Rectified(inplace)
        self.head = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(6, 2, 1))

    def forward(self, images: list[Tensor], targets: object = None) -> dict[str, Tensor]:
        levels = self.backbone(torch.stack(images))
        return {"loss_head": sum(self.head(level).square().mean() for level in levels)}


class Rectified(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.fine, self.coarse, self.act = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 6, 2, 2), nn.SiLU(inplace)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        coarse = self.coarse(self.act(fine))  # in place: the level that is returned is the one behind the activation
        return [fine if self.act.inplace else self.act(fine), coarse]


@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")  # of a teacher whose weights are random
@pytest.mark.parametrize("how", [{}, {"adapter": True}, {"align": "permute"}, {"align": "linear"}], ids=str)
def test_activations_in_place_change_no_loss_and_no_gradient(how):
    """In the student's head, behind its recorded levels, and in both backbones, before them."""
    losses, gradients = [], []
    for inplace in (True, False):
        student, teacher = InPlace(inplace=inplace).train(), InPlace(1, inplace=inplace)
        with attach(student, teacher, **how) as handle:
            if how:
                handle.calibrate([batch(4)])
            terms = student(batch(2))
            sum(terms.values()).backward()
        losses.append({name: term.item() for name, term in terms.items()})
        gradients.append([parameter.grad for parameter in student.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", [{"adapter": True}, {"align": "permute"}, {"align": "linear"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_aligned_holds_under_autocast_and_loss_scaling(how, dtype):
    student, teacher = Detector().train(), Detector(seed=1)
    with attach(student, teacher, **how) as handle:
        handle.calibrate([batch(4)])
        exact = student(batch(2))["loss_pkd"].item()
        with torch.autocast("cpu", dtype):
            low = student(batch(2))["loss_pkd"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        scaler.scale(low).backward()
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact, rel=0.03)
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


def test_a_student_that_is_evaluated_between_steps_runs_no_teacher_and_finds_what_it_finds_alone(teacher, images):
    student = detector(small_spec()).train()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append("whole"))
    teacher.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
    alone = copy.deepcopy(student).eval()(images)
    with Distiller(student, teacher, align="linear", own_size=True) as distiller:
        distiller.calibrate([images])
        calls.clear()
        student.eval()
        found = student(images)
        assert not calls
    for ours, theirs in zip(found, alone, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Tabulated(Detector):
    """Makes a table in its first forward and keeps it, as position encodings and anchors are kept."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.table: Tensor | None = None
        self.backbone.fine.register_forward_pre_hook(self._positions)

    def _positions(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        if self.table is None:
            self.table = torch.linspace(0.5, 1, inputs[0].shape[-1]).expand(3, 1, -1).contiguous()
        return (inputs[0] * self.table,)


@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")  # of a teacher whose weights are random
@pytest.mark.parametrize("imitation", ["pearson", "mse", "cwd"])
def test_a_teacher_that_keeps_what_its_forward_made_can_be_trained_afterwards(imitation):
    """Tensors of ``torch.inference_mode`` could be saved for no backward pass: not the levels, and not the table."""
    student, teacher = Detector().train(), Tabulated(1)
    with Distiller(student, teacher, imitation=imitation, own_size=True) as distiller:
        student(batch(2))
        distiller.loss().backward()
    assert student.backbone.fine.weight.grad.abs().sum() > 0
    pixels = torch.stack(batch(2)).requires_grad_()  # whose gradient needs the table
    teacher.backbone(pixels)["coarse"].sum().backward()
    assert teacher.table is not None and pixels.grad.abs().sum() > 0


class Finding(nn.Module):
    """Finds the boxes that it is told, whatever it sees."""

    def __init__(self, boxes: list[list[list[float]]]) -> None:
        super().__init__()
        self.boxes, self.scale = boxes, nn.Parameter(torch.ones(()))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        found = [torch.tensor(boxes).reshape(-1, 4) for boxes in self.boxes]
        return [
            {"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64), "scores": torch.ones(len(b))} for b in found
        ]


def test_a_teacher_that_finds_nothing_is_said_once(targets, images):
    """Not loaded, or fed with the wrong images: what a student's mAP of 0 came from."""
    right = [[[4.0, 4.0, 40.0, 30.0], [0.0, 0.0, 2.0, 2.0]], [[5.0, 5.0, 40.0, 44.0]]]  # more than half of the first
    assert recall_of(Finding(right).train(), [(images, targets)]) == (2, 3)
    say_if_blind(Finding(right), [(images, targets)] * 2)  # and says nothing, as a warning would be an error
    blind = Finding([[[0.0, 0.0, 2.0, 2.0], [4.0, 4.0, 40.0, 22.0]], []])  # and less
    say_if_blind(blind, [(images, [{"boxes": torch.zeros(0, 4)}] * 2)])  # where there is nothing to find
    with pytest.warns(Notice, match=r"teacher \(Finding\) finds none of 3 objects in training images; .*weights"):
        say_if_blind(blind, [(images, targets)])
    say_if_blind(blind, [(images, targets)])
    assert recall_of(blind, [(images, targets)]) == (0, 3)
    with pytest.raises(InputError, match=r"give \(images, targets\)"):
        recall_of(Finding(right), [images])
