"""Distillation through the features: the Pearson loss between two pyramids."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from jdkd.distill.hooks import Hook
from jdkd.distill.levels import as_index, pair_levels, select_channels
from jdkd.distill.neck import Pyramid, levels_of, with_levels
from jdkd.distill.teacher import TeacherView
from jdkd.nn import PearsonTap


class FeatureDistiller:
    """PKD (Cao et al., NeurIPS 2022) between a student's pyramid and a teacher's, paired by stride.

    A context manager::

        with FeatureDistiller(student, teacher) as distiller:
            def losses(images, targets, step):
                terms = student(images, targets)
                yield terms | {"loss_pkd": distiller.loss()}
            fit(student, dataset, config, device=device, losses=losses)

    In training mode the loss is computed as soon as the student's neck has run, and the heads are given the levels
    that :func:`jdkd.functional.pearson_tap` returns in place of the neck's: the same numbers, whose gradients are
    added where the loss's is computed. In evaluation mode, or while ``view.silent`` is set, nothing runs.

    Args:
        student, teacher: detectors; see :class:`TeacherView`. Their heads may differ in every way.
        loss_weight: weight of each level; the paper's configurations use 6 for two-stage and 10 for one-stage
            pairs. At 0 (it may be changed: ``tap.loss_weight``) the loss is 0 and nothing runs.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's, where the student's
            pyramid was pruned.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        view: a shared view of the teacher; by default its own.
        **options: level_weights, statistics, zero_variance and group of :func:`jdkd.functional.pearson_tap`.
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
        **options: Any,
    ) -> None:
        self.view = view or TeacherView(student, teacher)
        self.tap = PearsonTap(loss_weight, return_levels=True, **options)
        self.levels = None if levels is None else tuple(levels)
        self.level_losses: dict[int, Tensor] = {}  # stride -> scalar, detached, of the last training forward
        self._channels = as_index(channels)
        self._loss: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self.view.__enter__()
        self._hooks = [
            self.view.student.register_forward_pre_hook(Hook(self._begun), prepend=True),
            self.view.neck.register_forward_hook(Hook(self._arrived)),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._loss = [], None
        self.view.__exit__(*error)

    def loss(self) -> Tensor:
        """The loss of the student's last forward, a scalar in fp32; once per forward.

        Raises:
            RuntimeError: the student has not run, in training mode, since the last call.
        """
        if self._loss is None:
            raise RuntimeError(
                "the student has not run in training mode since the last loss(): call it first, inside the with block"
            )
        loss, self._loss = self._loss, None
        return loss

    def _begun(self, student: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._loss = None

    def _arrived(self, neck: nn.Module, inputs: tuple[Any, ...], pyramid: Pyramid) -> Pyramid | None:
        """Adds the loss, as a neck may run more than once; returns what the heads get in place of the pyramid.

        Raises:
            InputError: no level matches, or channel counts differ.
        """
        view = self.view
        if view.silent or not view.student.training:
            return None
        if self._loss is None:
            self.level_losses = {}
        if not self.tap.loss_weight:
            self._loss = torch.zeros((), device=view.device)
            return None
        pairs = pair_levels(levels_of(pyramid), levels_of(view.teacher_pyramid), view.size, self.levels)
        if self._channels is not None:
            self._channels = self._channels.to(view.device)
        students = [student for student, _ in pairs.values()]
        teachers = [select_channels(teacher, student, self._channels) for student, teacher in pairs.values()]
        tapped, loss, losses = self.tap(students, teachers)
        self._loss = loss if self._loss is None else self._loss + loss
        for stride, own in zip(pairs, losses.unbind(), strict=True):
            self.level_losses[stride] = self.level_losses.get(stride, 0) + own
        return with_levels(pyramid, students, tapped)
