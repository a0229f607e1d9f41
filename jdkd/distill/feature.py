"""Distillation through the features: the Pearson loss, or another, between two pyramids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jdkd.distill.adapter import Adapters
from jdkd.distill.alignment import aligned_pairs
from jdkd.distill.calibration import ADAPTER, Agreements, Permutations, as_alignment, calibrated
from jdkd.distill.channels import Channels, TeacherChannels
from jdkd.distill.gradients import FORWARD, check_gradient, pass_number
from jdkd.distill.hooks import Hook
from jdkd.distill.imitation import ChannelWiseDivergence, SquaredError
from jdkd.distill.levels import as_strides
from jdkd.distill.neck import Pyramid, addresses_of, with_levels
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
        own_size: the teacher sees the batch at its own input size, see :class:`TeacherRunner`; the student's levels are
            resized to its.
        adapter: compare through trained 1x1 convolutions from the student's channels to the teacher's, so that widths
            may differ in any way; then without ``channels``. Call :meth:`calibrate` before training, and have
            :attr:`adapters` trained with the student: ``fit(..., auxiliary=distiller.adapters)``.
        align: for detectors of unrelated origin, whose channels mean other things: ``"permute"`` matches each of the
            student's with one of the teacher's, ``"linear"`` predicts the teacher's by a 1x1 map that is never trained,
            ``"none"`` takes them as they come. Call :meth:`calibrate` before training; given to ``fit`` as
            ``auxiliary`` too, what was found is the same in a resumed run.
        imitation: ``"pearson"``; ``"mse"`` for the squared error (FitNets; Romero et al., ICLR 2015), which sees
            scales and offsets too; or ``"cwd"`` for the divergence between what channels say of positions (Shu et al.,
            ICCV 2021). Those two take none of Pearson's options below.
        tau: temperature of ``"cwd"``.
        runner: a shared runner of the teacher; by default its own, and then it knows whether ``own_size`` is meant.
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
        own_size: bool = False,
        adapter: bool = False,
        align: str = "none",
        imitation: str = "pearson",
        tau: float = 1.0,
        runner: TeacherRunner | None = None,
        level_weights: Sequence[float] | None = None,
        statistics: str = "batch",
        zero_variance: str = "keep",
        group: ProcessGroup | None = None,
    ) -> None:
        options: dict[str, Any] = {"statistics": statistics, "zero_variance": zero_variance, "group": group}
        settings_of(len(level_weights) if isinstance(level_weights, Sized) else 0, level_weights, 1.0, **options)
        self.align = as_alignment(align, adapter=adapter)
        if self.align != "none" and channels is not None:
            given = ADAPTER if adapter else f"align={align!r}"
            raise InputError(f"{given} and channels are both given; the former finds the channels, leave channels out")
        self.levels = as_strides(levels)
        self._channels = TeacherChannels(channels) if self.align == "none" else None
        options = {"level_weights": level_weights, **options, "tau": tau}
        self.tap = _imitation(imitation, as_weight(loss_weight), options)
        self.runner = runner or TeacherRunner(student, teacher, own_size=own_size)
        self.adapters: Adapters | Permutations | None = None  # what stands between every pair of levels, once fitted
        self.level_losses: dict[int, Tensor] = {}  # stride -> scalar, detached, of the last training forward
        self._loss: Tensor | None = None
        self._begun_with_gradients = True
        self._learns = False  # whether a gradient reaches the student through one of its levels
        self._ran_with_gradients = False
        self._begun_in = FORWARD
        self._levels: set[int] = set()  # addresses of those that the heads were given
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self.runner.__enter__()
        self._hooks = [
            self.runner.student.register_forward_pre_hook(Hook(self._begun), prepend=True),
            self.runner.watch_pyramid(self._arrived),
            *(writer.register_forward_pre_hook(Hook(self._spared)) for writer in self.runner.writers()),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._loss = [], None
        self.runner.__exit__(*error)

    def calibrate(self, batches: Iterable[Any], call: Callable[[Any], Any] | None = None) -> Agreements:
        """Makes :attr:`adapters`, what ``adapter`` or ``align`` puts between the channels of both, from a few images.

        A 1x1 map begins as the least squares in closed form, which is also the map of the largest Pearson correlation,
        so that the loss says something from the first step; where a level has few positions it stays near 0, or,
        between equal widths, near the identity. Channels are matched by the assignment of the largest sum of r.

        Args:
            batches: ``(images, targets)``, lists of images ``[3, H, W]`` in 0..1, tensors ``[N, 3, H, W]``, or
                mappings of what the student is called with. Both detectors are run on them in evaluation mode:
                calibrate a student's batch norms before.
            call: ``call(batch)`` runs the student on a batch, where it takes no list of images.

        Returns:
            stride -> mean r of the channels before, where widths agree, and after; print it. The latter is of images
            that the map was not fitted to, half by half, unless there is but one.

        Raises:
            InputError: there is no batch, no level matches, or channels cannot be matched.
        """
        runner = self.runner
        compared = runner.compared(batches, self.levels, self._channels, call)
        who = type(runner.student).__name__, type(runner.teacher).__name__
        bias = isinstance(self.tap, SquaredError)
        with torch.inference_mode(False):  # where adapters would be made that cannot be trained
            self.adapters, agreements = calibrated(compared, self.align, bias=bias, who=who)
        return agreements

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
            check_gradient(self._learns, self.runner.student, "pyramid", ran_with_gradients=self._ran_with_gradients)
        return loss

    @property
    def has_loss(self) -> bool:
        """Whether the student's neck has run since the last loss was taken."""
        return self._loss is not None

    def _begun(self, student: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._loss = None
        self._levels = set()
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
            self.level_losses, self._ran_with_gradients, self._learns = {}, False, False
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
        ours, theirs = self.runner.of_student(pyramid), self.runner.of_teacher
        pairs = aligned_pairs(ours, theirs, self.levels, self._channels)
        students: Sequence[Tensor] = [pair.student for pair in pairs]
        teachers: Sequence[Tensor] = [pair.teacher for pair in pairs]
        self._learns |= any(level.requires_grad for level in students)
        if self._channels is None:
            students, teachers = self._brought_together(students, teachers)
        tapped, loss, losses = self.tap(students, teachers)
        # Of levels that were resized or adapted, which the pyramid does not hold, the heads keep the neck's.
        pyramid = with_levels(pyramid, students, tapped)
        self._levels = addresses_of(pyramid)
        return pyramid, [pair.stride for pair in pairs], loss, losses

    def _spared(self, writer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Gives a head that writes to a level a copy, as the gradient of the loss needs the level as it was."""
        level = inputs[0] if inputs else None
        if not isinstance(level, Tensor) or self._levels.isdisjoint(addresses_of(level)):
            return None
        return level.clone(), *inputs[1:]

    def _brought_together(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self.adapters is None:
            asked = ADAPTER if self.align == ADAPTER else f"align={self.align!r}"
            raise InputError(f"{asked} is asked for and there is none yet; call calibrate(batches) before training")
        return self.adapters(students, teachers)


def _imitation(
    name: str, loss_weight: float, options: dict[str, Any]
) -> PearsonTap | SquaredError | ChannelWiseDivergence:
    takes = {"pearson": {*options} - {"tau"}, "mse": set(), "cwd": {"tau"}}
    if name not in takes:
        raise InputError(f"imitation is {name!r}; choose {', '.join([*takes][:-1])} or {[*takes][-1]}")
    defaults = FeatureDistiller.__init__.__kwdefaults__ or {}
    if given := [each for each in options if each not in takes[name] and options[each] != defaults[each]]:
        other = next(other for other, taken in takes.items() if given[0] in taken)
        raise InputError(f"imitation is {name!r}, which takes no {', '.join(given)}; leave that out, or take {other!r}")
    if name == "pearson":
        return PearsonTap(loss_weight, return_levels=True, **{option: options[option] for option in takes[name]})
    if name == "mse":
        return SquaredError(loss_weight)
    if not (isinstance(options["tau"], int | float) and 0 < options["tau"] < math.inf):
        raise InputError(f"tau is {options['tau']!r}, a temperature; give a finite number above 0")
    return ChannelWiseDivergence(loss_weight, options["tau"])


def as_weight(weight: Any, name: str = "loss_weight") -> float:
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
        raise InputError(f"{name} is {weight!r}; give a finite number, 0 or above")
    return number
