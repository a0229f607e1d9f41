"""Distillation through the class logits: what the teacher would have said of the student's regions or anchors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.distill.feature import as_weight
from jdkd.distill.gradients import check_gradient
from jdkd.distill.hooks import Hook
from jdkd.distill.teacher import TeacherRunner
from jdkd.errors import InputError, few
from jdkd.nn.unwrapping import unwrapped

if TYPE_CHECKING:
    from jdkd.detect.heads import ClassHead


def can_distil_heads(student: nn.Module, teacher: nn.Module, *, own_size: bool = False) -> bool:
    """Whether :class:`HeadDistiller` takes two detectors: their heads classify the same places, in the same way.

    Args:
        student, teacher: detectors.
        own_size: whether the teacher sees images at its own input size, see :class:`TeacherRunner`.
    """
    return _objection(unwrapped(student), unwrapped(teacher), own_size) is None


class HeadDistiller:
    """Class logits of a student, against the teacher's for the same places: regions, or all anchors.

    Of two-stage detectors the teacher pools its own features at the regions that the student sampled and classifies
    them; the loss is the mean Kullback-Leibler divergence over regions at temperature 1, whose gradient is that of
    the soft cross entropy (Hinton et al. 2015; for detectors Chen et al., NIPS 2017, section 3.1, here without their
    class weights).

    One-stage detectors classify every anchor, most of which are background, so their divergences are summed, and
    divided by how many anchors hold an object in the teacher's eyes (the sum of its scores, at least 1), as their own
    losses are by the anchors that match one. Where each class has a sigmoid of its own the divergence is binary,
    summed over classes. This normalisation is ours.

    A teacher that sees images at its own size is asked about regions at their places there. Not about anchors: at
    another size an object belongs to those of another level, so that the two heads would rightly disagree.

    A context manager, used as :class:`jdkd.distill.feature.FeatureDistiller` is.

    Args:
        student, teacher: detectors of torchvision's heads, for the same classes in the same order (by their names,
            where both know some), in the same stages, and with the same anchors where all are classified.
        loss_weight: weight of the loss.
        runner: a shared runner of the teacher; by default its own.

    Raises:
        InputError: one of the two has no such head, they do not classify the same, or all anchors at two sizes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss_weight: float = 1.0,
        runner: TeacherRunner | None = None,
    ) -> None:
        from jdkd.detect.heads import class_head

        student, teacher = unwrapped(student), unwrapped(teacher)
        if (objection := _objection(student, teacher, runner is not None and runner.own_size)) is not None:
            raise InputError(f"{objection}; distil the features only (head_weight 0, loss 'pkd').")
        self._head = cast("ClassHead", class_head(student))
        self._teachers_head = cast("ClassHead", class_head(teacher))
        self.runner = runner or TeacherRunner(student, teacher)
        self.loss_weight = as_weight(loss_weight)
        self._hooks: list[Any] = []
        self._places: Any = None
        self._logits: Tensor | None = None  # [R, K]
        self._ran_with_gradients = False
        self._autocast: tuple[bool, torch.dtype] = False, torch.bfloat16  # during the student's forward

    def __enter__(self) -> Self:
        self.runner.__enter__()
        self._hooks = [self._head.says.register_forward_hook(Hook(self._see_logits))]
        if self._head.asked is not None:
            self._hooks.append(self._head.asked.register_forward_pre_hook(Hook(self._see_places)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._places, self._logits = [], None, None
        self.runner.__exit__(*error)

    def loss(self) -> Tensor:
        """The loss of the student's last forward, a scalar in fp32; once per forward.

        Raises:
            RuntimeError: the student has not run since the last call.
            InputError: the loss is a constant, as no gradient can reach the student through its class logits; or the
                two have not as many anchors.
        """
        if self._logits is None:
            raise RuntimeError("the student has not run since the last loss(): call it first, inside the with block")
        places, logits = self._places, self._logits
        self._places = self._logits = None
        if self._ran_with_gradients:
            check_gradient(logits.requires_grad, self.runner.student, "class logits", ran_with_gradients=True)
        enabled, dtype = self._autocast
        with torch.no_grad(), torch.autocast(logits.device.type, dtype, enabled):
            seen = self.runner.of_teacher
            taught = self._teachers_head.about(places, seen.pyramid, seen.sizes if self.runner.own_size else None)
        if taught.shape != logits.shape:
            raise InputError(
                f"the student classifies {len(logits)} anchors of a batch and the teacher {len(taught)}; take a "
                "teacher with levels of the same strides, or distil the features only (head_weight 0, loss 'pkd')."
            )
        divergence, objects = _divergence(logits.float(), taught.float(), self._head.exclusive)
        count = objects.clamp(min=1) if self._head.dense else max(1, len(logits))
        return divergence * (self.loss_weight / count)

    def _see_places(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._places = self._head.places(inputs)

    def _see_logits(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._logits, self._ran_with_gradients = self._head.logits(output), torch.is_grad_enabled()
        kind = self._logits.device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _objection(student: nn.Module, teacher: nn.Module, own_size: bool) -> str | None:
    """Why the heads of two detectors cannot be compared."""
    from jdkd.detect.architecture import known_architecture, unlike
    from jdkd.detect.heads import class_head
    from jdkd.detect.input_size import resizes_alike

    ours, theirs = class_head(student), class_head(teacher)
    if ours is None or theirs is None:
        who, model = ("student", student) if ours is None else ("teacher", teacher)
        return (
            f"the {who} ({type(model).__name__}) has no head of torchvision's that classifies regions or anchors, "
            "and head distillation needs one on both"
        )
    if (reason := ours.objection(theirs)) is not None:
        names = f"student ({type(student).__name__}) and teacher ({type(teacher).__name__})"
        return f"the heads of {names} cannot be compared: {reason}"
    if ours.outputs != theirs.outputs:
        return (
            f"the student knows {ours.outputs - 1} classes and the teacher {theirs.outputs - 1}, and head distillation "
            "needs the same"
        )
    first, second = (known.classes if (known := known_architecture(model)) else () for model in (student, teacher))
    if first and second and (difference := unlike(first, second)):
        return (
            f"the student knows the classes {few(first)} and the teacher {few(second)}, and head distillation needs "
            f"the same in one order ({difference}; `jdkd import --classes` names a detector's)"
        )
    if own_size and ours.dense and not resizes_alike(student, teacher):
        return (
            f"the heads of student ({type(student).__name__}) and teacher ({type(teacher).__name__}) classify anchors, "
            "and at the teacher's own input size, which is not the student's, an object belongs to other levels of them"
        )
    return None


def _divergence(ours: Tensor, theirs: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
    """The sum of Kullback-Leibler divergences, and of the teacher's scores for there being an object.

    Args:
        ours, theirs: logits ``[R, K]``; label 0 is the background where classes are exclusive.
        exclusive: softmax, or a sigmoid for each class.
    """
    if exclusive:
        ours, theirs = F.log_softmax(ours, dim=1), F.log_softmax(theirs, dim=1)
        return F.kl_div(ours, theirs, reduction="sum", log_target=True), -theirs[:, 0].expm1().sum()
    sides = [(F.logsigmoid(sign * ours), F.logsigmoid(sign * theirs)) for sign in (1, -1)]
    divergence = sum(F.kl_div(one, other, reduction="sum", log_target=True) for one, other in sides)
    return cast(Tensor, divergence), theirs.sigmoid().amax(dim=1).sum()
