"""Distillation through the features: the Pearson loss between two pyramids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jdkd.distill.channels import Channels, TeacherChannels
from jdkd.distill.gradients import FORWARD, check_gradient, pass_number
from jdkd.distill.hooks import Hook
from jdkd.distill.levels import as_strides, pair_levels
from jdkd.distill.neck import Pyramid, found_levels, with_levels
from jdkd.distill.teacher import TeacherRunner
from jdkd.errors import InputError
from jdkd.nn import PearsonTap
from jdkd.ops.pearson_settings import settings_of


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
    added where the loss's is computed. In evaluation mode, or while ``runner.enabled`` is False, nothing runs.

    Args:
        student, teacher: detectors; see :class:`TeacherRunner`. Their heads may differ in every way.
        loss_weight: weight of each level; the paper's configurations use 6 for two-stage and 10 for one-stage
            pairs. At 0 (it may be changed: ``tap.loss_weight``) the loss is 0 and nothing runs.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's, where the student's
            pyramid was pruned; or a list a level, see :class:`jdkd.distill.channels.TeacherChannels`.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        runner: a shared runner of the teacher; by default its own.
        level_weights, statistics, zero_variance, group: see :func:`jdkd.functional.pearson_tap`.

    Raises:
        InputError: an argument is none of what it may be.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss_weight: float = 6.0,
        channels: Channels = None,
        levels: Iterable[int] | None = None,
        runner: TeacherRunner | None = None,
        level_weights: Sequence[float] | None = None,
        statistics: str = "batch",
        zero_variance: str = "keep",
        group: ProcessGroup | None = None,
    ) -> None:
        options = {"statistics": statistics, "zero_variance": zero_variance, "group": group}
        settings_of(len(level_weights) if hasattr(level_weights, "__len__") else 0, level_weights, 1.0, **options)
        self.levels = as_strides(levels)
        self._channels = TeacherChannels(channels)
        self.tap = PearsonTap(as_weight(loss_weight), return_levels=True, level_weights=level_weights, **options)
        self.runner = runner or TeacherRunner(student, teacher)
        self.level_losses: dict[int, Tensor] = {}  # stride -> scalar, detached, of the last training forward
        self._loss: Tensor | None = None
        self._begun_with_gradients = True
        self._ran_with_gradients = False
        self._begun_in = FORWARD
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self.runner.__enter__()
        self._hooks = [
            self.runner.student.register_forward_pre_hook(Hook(self._begun), prepend=True),
            self.runner.neck.register_forward_hook(Hook(self._arrived)),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._loss = [], None
        self.runner.__exit__(*error)

    def loss(self) -> Tensor:
        """The loss of the student's last forward, a scalar in fp32; once per forward.

        Raises:
            RuntimeError: the student has not run, in training mode, since the last call.
            InputError: the loss is a constant, as no gradient can reach the student through its pyramid.
        """
        if self._loss is None:
            raise RuntimeError(
                "the student has not run in training mode since the last loss(): call it first, inside the with block"
            )
        loss, self._loss = self._loss, None
        if self.tap.loss_weight and self._begun_with_gradients:
            check_gradient(loss, self.runner.student, "pyramid", ran_with_gradients=self._ran_with_gradients)
        return loss

    @property
    def has_loss(self) -> bool:
        """Whether the student's neck has run since the last loss was taken."""
        return self._loss is not None

    def _begun(self, student: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._loss = None
        self._begun_with_gradients, self._begun_in = torch.is_grad_enabled(), pass_number()

    def _arrived(self, neck: nn.Module, inputs: tuple[Any, ...], pyramid: Pyramid) -> Pyramid | None:
        """Adds the loss, as a neck may run more than once; returns what the heads get in place of the pyramid.

        Raises:
            InputError: no level matches, channel counts differ, or the teacher has seen other images meanwhile.
        """
        runner = self.runner
        if not runner.enabled or not runner.student.training:
            return None
        pyramid = list(pyramid) if isinstance(pyramid, Iterator) else pyramid  # it can be read but once
        runner.check_batch_of(inputs)
        if pass_number() not in (FORWARD, self._begun_in):  # a checkpoint recomputes the neck: its loss was given
            return self._tapped(pyramid)[0] if self.tap.loss_weight else pyramid
        if self._loss is None:
            self.level_losses, self._ran_with_gradients = {}, False
        self._ran_with_gradients |= torch.is_grad_enabled()
        if not self.tap.loss_weight:
            self._loss = torch.zeros((), device=runner.device)
            return pyramid
        pyramid, strides, loss, losses = self._tapped(pyramid)
        self._loss = loss if self._loss is None else self._loss + loss
        for stride, own in zip(strides, losses.unbind(), strict=True):
            self.level_losses[stride] = self.level_losses.get(stride, 0) + own
        return pyramid

    def _tapped(self, pyramid: Pyramid) -> tuple[Pyramid, list[int], Tensor, Tensor]:
        """The pyramid that the heads get; and strides, loss and its part by level ``[L]`` of the levels compared."""
        runner = self.runner
        ours, theirs = found_levels(pyramid, "student"), found_levels(runner.teacher_pyramid, "teacher")
        pairs = pair_levels(ours, theirs, runner.size, self.levels, channels=self._channels)
        students = [pair.student for pair in pairs]
        tapped, loss, losses = self.tap(students, [pair.teacher for pair in pairs])
        return with_levels(pyramid, students, tapped), [pair.stride for pair in pairs], loss, losses


def as_weight(weight: Any) -> float:
    """The weight of a loss.

    Raises:
        InputError: it is no finite number from 0 up.
    """
    learned = isinstance(weight, Tensor) and weight.requires_grad  # it would get no gradient
    try:
        number = math.nan if learned or isinstance(weight, str | bytes | bool) else float(weight)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise InputError(f"loss_weight is {weight!r}; give a finite number, 0 or above")
    return number
