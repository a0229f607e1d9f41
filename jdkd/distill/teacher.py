"""The teacher's view of the batch that the student has just seen."""

from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from jdkd.distill.hooks import Hook
from jdkd.distill.neck import Pyramid, entrance, find_neck, run_to_neck
from jdkd.errors import InputError


class TeacherView:
    """Watches what enters a student and, when asked, runs the teacher on the same batch, up to its neck.

    A context manager that may be entered several times over, so that several losses share one view. While it
    is entered the teacher is in evaluation mode and needs no gradients; afterwards (when the last view leaves it,
    if several students share it) it is as it was, but for the device. The
    teacher runs without a graph, on the student's device, at most once per forward of the student, and never
    becomes part of it.

    Args:
        student, teacher: detectors with a submodule that returns a pyramid (see :func:`find_neck`) and that images
            ``[N, 3, H, W]`` reach through their ``backbone``, or else as the first argument. If the two normalise
            images differently (``transform.image_mean`` and ``image_std``), the batch is converted.
        reuse: keep the teacher's pyramid while the student is given the very same images, as when several
            subnets are trained in one step. Only for a teacher that does not change in between.
        neck, teacher_neck: dotted names of the submodules that return the pyramids, where they are others than
            ``neck`` or ``backbone``; the teacher's is as the student's unless given.

    Raises:
        InputError: the two share parameters, so that freezing one would freeze the other, or one has no neck.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        reuse: bool = False,
        neck: str | None = None,
        teacher_neck: str | None = None,
    ) -> None:
        shared = {id(parameter) for parameter in student.parameters()}
        for name, parameter in teacher.named_parameters():
            if id(parameter) in shared:
                raise InputError(
                    f"teacher and student share the parameter {name}; teach with a copy of the teacher (copy.deepcopy)."
                )
        self.student, self.teacher, self.reuse = student, teacher, reuse
        self.neck = find_neck(student, "student", neck)
        self.teacher_neck = find_neck(teacher, "teacher", neck if teacher_neck is None else teacher_neck)
        self.silent = False  # whether losses that are computed during the student's forward are left out
        self._entered = 0
        self._hooks: list[Any] = []
        self._batch: Tensor | None = None  # [N, 3, H, W], as the student normalised it
        self._taught: Pyramid | None = None
        self._images: tuple[tuple[Tensor, int], ...] = ()
        self._same_images = False

    def __enter__(self) -> Self:
        self._entered += 1
        if self._entered == 1:
            _hold(self.teacher)
            hooks = [entrance(self.student).register_forward_pre_hook(Hook(self._see), with_kwargs=True)]
            if self.reuse:
                hooks.append(self.student.register_forward_pre_hook(Hook(self._see_images), prepend=True))
            self._hooks = hooks
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            for hook in self._hooks:
                hook.remove()
            _release(self.teacher)
            self._hooks, self._images = [], ()
            self._batch = self._taught = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the batch."""
        return tuple(self._seen().shape[-2:])

    @property
    def device(self) -> torch.device:
        return self._seen().device

    @property
    def teacher_pyramid(self) -> Pyramid:
        """The teacher's levels for the student's last batch; kept only where they may be asked for again."""
        if self._taught is not None:
            return self._taught
        batch = self._seen()
        first = next((parameter for parameter in self.teacher.parameters() if parameter.is_floating_point()), batch)
        if first.device != batch.device:
            self.teacher.to(batch.device)
        if self.teacher.training:  # a container that holds both may have put it there
            self.teacher.eval()
        with torch.no_grad():
            shown = renormalised(batch, self.student, self.teacher).to(first.dtype)
            taught = run_to_neck(self.teacher, self.teacher_neck, shown)
        if self.reuse or self._entered > 1:
            self._taught = taught
        return taught

    def _seen(self) -> Tensor:
        if self._batch is None:
            raise RuntimeError("the student has not seen a batch since its teacher was attached: call it first")
        return self._batch

    def _see(self, entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next(iter((*args, *kwargs.values())), None)
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            if not self.student.training:
                return
            got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise InputError(
                f"the student's {type(entered).__name__} was given {got}, and the teacher needs the same images as a "
                "tensor [N, 3, H, W]; give the student a backbone that is called with one"
            )
        keep = self._same_images and self._batch is not None and self._batch.shape == batch.shape
        self._same_images = False
        self._batch = batch.detach()
        if not keep:
            self._taught = None

    def _see_images(self, student: nn.Module, inputs: tuple[Any, ...]) -> None:
        images = tuple((image, image._version) for image in inputs[0]) if inputs else ()
        before = self._images
        self._same_images = 0 < len(images) == len(before) and all(
            image is other and version == seen for (image, version), (other, seen) in zip(images, before, strict=True)
        )
        self._images = images


class _Held(NamedTuple):
    """How a teacher was before it taught: the modes of its modules, and which parameters wanted gradients."""

    modes: list[tuple[nn.Module, bool]]
    gradients: list[tuple[nn.Parameter, bool]]


_held: WeakKeyDictionary[nn.Module, list[_Held]] = WeakKeyDictionary()  # one entry a view that is entered


def _hold(teacher: nn.Module) -> None:
    """Puts a teacher into evaluation mode without gradients; several students may hold one teacher."""
    modes = [(module, module.training) for module in teacher.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    _held.setdefault(teacher, []).append(_Held(modes, gradients))
    teacher.eval().requires_grad_(False)


def _release(teacher: nn.Module) -> None:
    """The last one to leave a teacher puts it back as the first one found it."""
    entries = _held[teacher]
    if len(entries) > 1:
        entries.pop()
        return
    for module, training in entries[0].modes:
        module.training = training
    for parameter, required in entries[0].gradients:
        parameter.requires_grad_(required)
    del _held[teacher]


def renormalised(batch: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """A batch (``[N, 3, H, W]``) that the student normalised, as the teacher would have normalised it."""
    ours, theirs = getattr(student, "transform", None), getattr(teacher, "transform", None)
    if ours is None or theirs is None:
        return batch
    same = list(ours.image_mean) == list(theirs.image_mean) and list(ours.image_std) == list(theirs.image_std)
    if same:
        return batch
    mean, std, mean_t, std_t = (
        batch.new_tensor(values)[:, None, None]  # [3, 1, 1]
        for values in (ours.image_mean, ours.image_std, theirs.image_mean, theirs.image_std)
    )
    return (batch * std + (mean - mean_t)) / std_t
