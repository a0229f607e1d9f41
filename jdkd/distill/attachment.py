"""Distillation of a detector in somebody else's training loop, by a single call."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from jdkd.distill.feature import FeatureDistiller
from jdkd.distill.hooks import Hook
from jdkd.distill.teacher import TeacherView
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped

LOSS = "loss_pkd"


class Attachment:
    """A student that is being distilled; made by :func:`attach`, and a context manager that ends with ``remove``."""

    def __init__(self, student: nn.Module, distiller: FeatureDistiller) -> None:
        if any(isinstance(getattr(hook, "function", None), Attachment) for hook in student._forward_hooks.values()):
            raise InputError(
                f"the student ({type(student).__name__}) already has a teacher attached; remove() that attachment first"
            )
        self._distiller = distiller.__enter__()
        self._hook = student.register_forward_hook(Hook(self))

    @property
    def loss_weight(self) -> float:
        """Weight of each level; may be set between steps, and at 0 the teacher does not run."""
        return self._distiller.tap.loss_weight

    @loss_weight.setter
    def loss_weight(self, weight: float) -> None:
        self._distiller.tap.loss_weight = weight

    @property
    def losses(self) -> dict[int, Tensor]:
        """Stride -> weighted loss of the level in the last step, a detached scalar on the student's device."""
        return self._distiller.level_losses

    def remove(self) -> None:
        """Leaves student and teacher as they were before; once is enough."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._distiller.__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __call__(self, student: nn.Module, inputs: tuple[Any, ...], losses: Any) -> dict[str, Tensor] | None:
        """The student's losses and the teacher's; a forward hook."""
        if not student.training:
            return None
        if not isinstance(losses, Mapping) or LOSS in losses:
            got = f"a {type(losses).__name__}" if not isinstance(losses, Mapping) else f"a loss {LOSS} of its own"
            raise InputError(
                f"the student ({type(student).__name__}) returned {got} in training mode, and attach adds {LOSS} to a "
                "dict of losses; use jdkd.distill.FeatureDistiller or jdkd.nn.PearsonTap in your training step"
            )
        return {**losses, LOSS: self._distiller.loss()}


def attach(
    student: nn.Module,
    teacher: nn.Module,
    loss_weight: float = 6.0,
    *,
    levels: Sequence[int] | None = None,
    channels: Tensor | Sequence[int] | None = None,
    neck: str | None = None,
    teacher_neck: str | None = None,
    **options: Any,
) -> Attachment:
    """Lets a teacher add ``loss_pkd`` to the losses that a detector returns in training mode.

    The Pearson loss (PKD; Cao et al., NeurIPS 2022) between both pyramids, their levels paired by stride, for
    torchvision's detectors and any other whose forward returns a dict of losses while training::

        student, teacher = retinanet_resnet50_fpn(), retinanet_resnet50_fpn_v2(weights="DEFAULT")
        with attach(student, teacher, loss_weight=10.0):
            for images, targets in loader:
                loss = sum(student(images, targets).values())
                ...

    Forward hooks do it: nothing is added to the student's parameters, buffers or state dict. Until ``remove`` the
    teacher is in evaluation mode without gradients; it sees the student's images at their size, normalised its own
    way, and only up to its neck. In evaluation mode nothing runs. Attach before or after wrapping in
    ``DistributedDataParallel``, which needs no ``find_unused_parameters``. Deep copies of the student, such as a
    running average, are not distilled.

    Args:
        student: the detector to train.
        teacher: another, moved to the student's device when first run.
        loss_weight: weight of each level; the paper's configurations use 6 for two-stage and 10 for one-stage pairs.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's, where they are not as many.
        neck: dotted name of the student's submodule that returns the pyramid, a tensor, sequence or mapping of
            ``[N, C, H, W]``; by default ``neck`` or else ``backbone``.
        teacher_neck: the teacher's; by default as the student's.
        **options: level_weights, statistics, zero_variance and group of :func:`jdkd.functional.pearson_tap`.

    Returns:
        A handle: ``losses`` for logging, ``loss_weight``, ``remove()``.

    Raises:
        InputError: one has no neck, the two share parameters, or the student has a teacher already; and, when the
            student runs, no levels pair up or its training forward returns no dict.
    """
    student, teacher = unwrapped(student), unwrapped(teacher)
    view = TeacherView(student, teacher, neck=neck, teacher_neck=teacher_neck)
    how = {"loss_weight": loss_weight, "levels": levels, "channels": channels}
    return Attachment(student, FeatureDistiller(student, teacher, view=view, **how, **options))
