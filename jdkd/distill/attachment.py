"""Distillation of a detector in somebody else's training loop, by a single call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from jdkd.distill.adapter import Adapters
from jdkd.distill.calibration import ADAPTER, Agreements, Permutations
from jdkd.distill.channels import Channels
from jdkd.distill.feature import FeatureDistiller, as_weight
from jdkd.distill.gradients import FORWARD, pass_number
from jdkd.distill.hooks import Hook
from jdkd.distill.outputs import with_loss
from jdkd.distill.teacher import TeacherRunner
from jdkd.errors import InputError
from jdkd.notices import say_once

FORGOTTEN = 100  # steps in which an optimiser that has the adapters would have changed them
OPTIONS = ("level_weights", "statistics", "zero_variance", "group")


class DistillationHandle:
    """A student that is being distilled; made by :func:`attach`, and a context manager that ends with ``remove``."""

    def __init__(self, distiller: FeatureDistiller) -> None:
        self._student, self._neck = distiller.runner.student, distiller.runner.neck
        hooks = [*self._student._forward_hooks.values(), *self._neck._forward_hooks.values()]
        if any(isinstance(_holder(hook), DistillationHandle) for hook in hooks):
            raise InputError(
                f"the student ({type(self._student).__name__}) already has a teacher attached; remove() that "
                "attachment first"
            )
        self._is_inside = False  # the student's forward
        self._steps = 0  # since the adapters were fitted
        self._fitted: list[tuple[nn.Parameter, int]] = []  # their parameters, and the versions of these then
        self._hooks = [distiller.runner.watch_pyramid(self._neck_ran)]
        with ExitStack() as undone:  # where the teacher is refused, the student is as it was
            undone.callback(self._hooks[0].remove)
            self._distiller = distiller.__enter__()
            undone.pop_all()
        self._hooks.append(self._student.register_forward_pre_hook(Hook(self._begun), prepend=True))
        self._hooks.append(self._student.register_forward_hook(Hook(self)))
        self._hooks.append(self._student.register_forward_hook(Hook(self._left), always_call=True))

    @property
    def loss_weight(self) -> float:
        """Weight of each level; may be set between steps, and at 0 the teacher does not run."""
        return self._distiller.tap.loss_weight

    @loss_weight.setter
    def loss_weight(self, weight: float) -> None:
        self._distiller.tap.loss_weight = as_weight(weight)

    @property
    def losses(self) -> dict[int, Tensor]:
        """Stride -> weighted loss of the levels in the last step, a detached scalar on the student's device."""
        return self._distiller.level_losses

    @property
    def adapters(self) -> Adapters | Permutations:
        """What stands between the channels of both, for ``adapter=True`` and ``align``; it is no part of the student.

        The parameters of adapters are trained with the student's:
        ``optimizer.add_param_group({"params": handle.adapters.parameters()})``. To resume, keep its state dict beside
        the student's.

        Raises:
            InputError: none was asked for, or there is none before :meth:`calibrate`.
        """
        if self._distiller.adapters is None:
            asked = self._distiller.align != "none"
            remedy = "call calibrate(batches) first" if asked else "attach with adapter=True, or with align"
            raise InputError(f"there are no adapters between student and teacher; {remedy}")
        return self._distiller.adapters

    def calibrate(self, batches: Iterable[Any], call: Callable[[Any], Any] | None = None) -> Agreements:
        """See :meth:`FeatureDistiller.calibrate`; call it before training.

        In a process group every process calls it: all begin with what the first one found, and the gradients of
        adapters are averaged, as DistributedDataParallel does with the student's.
        """
        agreements, self._steps = self._distiller.calibrate(batches, call), 0
        if self._distiller.adapters is not None:
            _share(self._distiller.adapters)
            self._fitted = [(parameter, parameter._version) for parameter in self._distiller.adapters.parameters()]
        return agreements

    def remove(self) -> None:
        """Leaves student and teacher as they were before; once is enough."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._distiller.__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __call__(self, student: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        """The student's outputs with the teacher's loss; a forward hook."""
        if not student.training:
            return None
        if not self._distiller.has_loss:
            name = type(student).__name__
            raise InputError(
                f"the student ({name}) did not call its {type(self._neck).__name__} in training mode, "
                "so there is no pyramid to distil; name the submodule that returns its pyramid with neck"
            )
        if self._distiller.align == ADAPTER and self.loss_weight and torch.is_grad_enabled():
            self._say_if_forgotten()
        return with_loss(outputs, self._distiller.loss(), type(student).__name__)

    def _say_if_forgotten(self) -> None:
        """Adapters that no optimiser was given stay as they were fitted, which nothing else would show."""
        self._steps += 1
        if self._steps == FORGOTTEN and all(p.grad is not None and p._version == v for p, v in self._fitted):
            say_once(
                f"the adapters were given gradients in {FORGOTTEN} steps and are as they were fitted; hand them to the "
                'optimiser, optimizer.add_param_group({"params": handle.adapters.parameters()}), or take '
                "align='linear', which is not trained"
            )

    def _begun(self, student: nn.Module, inputs: tuple[Any, ...]) -> None:
        if student is not self._student and student.training:
            raise InputError(
                f"the student ({type(student).__name__}) is a copy that DataParallel made, and copies have no teacher; "
                "train with DistributedDataParallel"
            )
        self._is_inside = True

    def _left(self, student: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        """The forward is over, or has raised an error, as where the memory was not enough."""
        self._is_inside = False

    def _neck_ran(self, neck: nn.Module, inputs: tuple[Any, ...], pyramid: Any) -> None:
        """Refuses a pyramid whose loss nobody would get, as the student's own forward does not run."""
        alone = self._student.training and torch.is_grad_enabled() and not self._is_inside
        if alone and pass_number() == FORWARD:  # a checkpoint runs it once more during backward
            raise InputError(
                f"the student's {type(neck).__name__} ran outside of the forward of {type(self._student).__name__}, "
                "which was attached, so that no loss could be added to what that returns; attach the module that your "
                "training step calls"
            )


def attach(
    student: nn.Module,
    teacher: nn.Module,
    loss_weight: float = 6.0,
    *,
    levels: Iterable[int] | None = None,
    channels: Channels = None,
    neck: str | None = None,
    teacher_neck: str | None = None,
    student_normalisation: Any = None,
    teacher_normalisation: Any = None,
    own_size: bool = False,
    adapter: bool = False,
    align: str = "none",
    **options: Any,
) -> DistillationHandle:
    """Lets a teacher add ``loss_pkd`` to the losses that a detector returns in training mode.

    The Pearson loss (PKD; Cao et al., NeurIPS 2022) between both pyramids, their levels paired by stride, for
    torchvision's detectors and any other whose forward returns a dict of losses while training::

        student, teacher = retinanet_resnet50_fpn(), retinanet_resnet50_fpn_v2(weights="DEFAULT")
        with attach(student, teacher, loss_weight=10.0):
            for images, targets in loader:
                loss = sum(student(images, targets).values())
                ...

    Of outputs that have an entry ``loss``, the total, as Hugging Face's models return them, the loss is added to that
    one instead; of a tuple to its first entry, which is the loss with ``return_dict=False`` and of Ultralytics' models
    (there it is one entry more; as theirs are sums over the batch, multiply ``loss_weight`` by its size). The outputs
    keep their type.

    Where widths differ, trained 1x1 convolutions bring the student's channels to the teacher's; where both have as many
    that mean other things, ``align`` does. Either is fitted on a few images first, and never becomes part of the
    student, its state dict or a copy of it::

        with attach(student, teacher, adapter=True) as handle:
            print(handle.calibrate(batches))  # mean r of their channels, before and after
            optimizer.add_param_group({"params": handle.adapters.parameters()})  # not for align

    Forward hooks do it: nothing is added to the student's parameters, buffers or state dict. Until ``remove`` the
    teacher is in evaluation mode without gradients; it sees the student's images at their size (unless ``own_size``),
    normalised its own way, and only up to its neck. In evaluation mode nothing runs. Attach before or after wrapping in
    ``DistributedDataParallel``, which needs no ``find_unused_parameters``. Deep copies of the student, such as a
    running average, are not distilled. What torchvision's RoI pools took for their scales is set right in both.

    How a detector normalises is read off torchvision's ``transform``, OpenMMLab's ``data_preprocessor``, detectron2's
    ``pixel_mean``, a step without weights that has mean and std, an ``image_processor``, or timm's ``pretrained_cfg``;
    what is not found there is given here.

    Args:
        student: the detector to train.
        teacher: another, moved to the student's device when first run. Either may be wrapped, in
            ``DistributedDataParallel``, ``AveragedModel``, ``torch.compile`` or a module around one detector.
        loss_weight: weight of each level; the paper's configurations use 6 for two-stage and 10 for one-stage pairs.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's, where they are not as many; or
            such a list for each of the student's levels, in the order in which its neck returns them or by their names.
        neck: dotted name of the student's submodule that returns the pyramid, a tensor, or sequences and mappings of
            ``[N, C, H, W]``; or of a head that is called with it, ``"head:input"``; by default ``neck``, or else
            ``backbone``, or else what the head of Ultralytics' models is called with.
        teacher_neck: the teacher's; by default as the student's.
        student_normalisation, teacher_normalisation: how the images are normalised that reach each backbone:
            ``(mean, std)``, ``(mean, std, scale, order)`` with ``scale`` 1 or 255 and ``order`` ``"rgb"`` or ``"bgr"``,
            an image processor that holds them, or ``"same"`` where both get the same images.
        own_size: let the teacher see the images that the student is called with, a list of ``[3, H, W]`` in 0..1, at
            its own input size, and resize the student's levels to its.
        adapter: compare through trained 1x1 convolutions from the student's channels to the teacher's; call
            ``calibrate(batches)`` on what is returned before training, and hand its ``adapters`` to the optimiser.
        align: ``"none"``; ``"permute"``, which matches each of the student's channels with one of the teacher's; or
            ``"linear"``, a 1x1 map that is not trained. Call ``calibrate(batches)`` here too.
        **options: level_weights, statistics, zero_variance and group of :func:`jdkd.functional.pearson_tap`.

    Returns:
        A handle: ``losses`` for logging, ``loss_weight``, ``calibrate(batches)``, ``adapters``, ``remove()``.

    Raises:
        InputError: one has no neck, the two share parameters, one alone says how it normalises, an argument is none of
            what it may be, or the student has a teacher already; and, when the student runs, no levels pair up, its
            training forward returns no losses, or no gradient would reach it from the teacher's.
    """
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise InputError(f"attach takes no option {', '.join(unknown)}; choose from {', '.join(OPTIONS)}")
    runner = TeacherRunner(
        student,
        teacher,
        neck=neck,
        teacher_neck=teacher_neck,
        student_normalisation=student_normalisation,
        teacher_normalisation=teacher_normalisation,
        own_size=own_size,
    )
    options |= {"loss_weight": loss_weight, "levels": levels, "channels": channels, "adapter": adapter, "align": align}
    return DistillationHandle(FeatureDistiller(student, teacher, runner=runner, **options))


def _share(adapters: nn.Module) -> None:
    """The processes of a group begin with the same, and have the same gradients."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    for tensor in (*adapters.parameters(), *adapters.buffers()):
        distributed.broadcast(tensor.detach(), 0)
    for parameter in adapters.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    if (gradient := parameter.grad) is not None:
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()


def _holder(hook: Any) -> Any:
    function = getattr(hook, "function", None)
    return getattr(function, "__self__", function)
