"""Distillation through the features: the Pearson loss between two pyramids."""

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from jdkd.distill.levels import as_index, pair_levels, select_channels
from jdkd.distill.teacher import TeacherView
from jdkd.functional import pkd_loss


class FeatureDistiller:
    """PKD (Cao et al., NeurIPS 2022) between a student's pyramid and a teacher's, paired by stride.

    A context manager::

        with FeatureDistiller(student, teacher) as distiller:
            def losses(images, targets, step):
                terms = student(images, targets)
                yield terms | {"loss_pkd": distiller.loss()}
            fit(student, dataset, config, device=device, losses=losses)

    Args:
        student, teacher: detectors with a ``backbone`` that returns a pyramid; their heads may differ in
            every way.
        loss_weight: weight of each level; the paper's configurations use 6 for two-stage and 10 for one-stage
            pairs.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's, where the student's
            pyramid was pruned.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        view: a shared view of the teacher; by default its own.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss_weight: float = 6.0,
        channels: Tensor | Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        view: TeacherView | None = None,
    ) -> None:
        self.view = view or TeacherView(student, teacher)
        self.loss_weight = loss_weight
        self.levels = levels
        self._channels = as_index(channels)
        self._fresh = False
        self._hook = None

    def __enter__(self) -> Self:
        self.view.__enter__()
        self._hook = self.view.student.backbone.register_forward_hook(self._arrived)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self._fresh = False
        self.view.__exit__(*error)

    def loss(self) -> Tensor:
        """The loss of the student's last forward, a scalar in fp32; once per forward.

        Raises:
            RuntimeError: the student has not run since the last call.
            InputError: no level matches, or channel counts differ.
        """
        if not self._fresh:
            raise RuntimeError("the student has not run since the last loss(): call it first, inside the with block")
        self._fresh = False
        pairs = pair_levels(self.view.student_pyramid, self.view.teacher_pyramid, self.view.size, self.levels)
        if self._channels is not None:
            self._channels = self._channels.to(self.view.device)
        students = [student for student, _ in pairs.values()]
        teachers = [select_channels(teacher, student, self._channels) for student, teacher in pairs.values()]
        return pkd_loss(students, teachers, loss_weight=self.loss_weight)

    def _arrived(self, *_: object) -> None:
        self._fresh = True
