"""The teacher, run on the batch that the student has just seen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot
from jdkd.distill.channels import TeacherChannels
from jdkd.distill.correlation import compared
from jdkd.distill.gradients import FORWARD, pass_number
from jdkd.distill.holding import hold, release
from jdkd.distill.hooks import Hook
from jdkd.distill.levels import LevelPair
from jdkd.distill.neck import Pyramid, addresses_of, found_levels
from jdkd.distill.roi_scales import set_roi_scales_of
from jdkd.distill.route import Route, module_of, route_of
from jdkd.distill.student_input import StudentInput, listed_images, parameters_of
from jdkd.distill.teacher_view import TeacherView
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import is_compiled, unwrapped
from jdkd.notices import say_once
from jdkd.ops.pearson_strides import Size

UNCOUNTED = -1  # version of a tensor of inference mode, of which nobody tells whether it was written to


class TeacherRunner:
    """Watches what enters a student and, when asked, runs the teacher on the same batch, up to its neck.

    A context manager that may be entered several times over, so that several losses share one runner. While it
    is entered the teacher is in evaluation mode and needs no gradients; afterwards (when the last one leaves it,
    if several students share it) it is as it was, but for the device. The teacher runs without a graph, on the
    student's device, at most once per forward of the student, and never becomes part of it.

    Args:
        student, teacher: detectors with a submodule that returns a pyramid and that images ``[N, C, H, W]`` reach
            through a ``backbone``, or else as an argument; wrapped or not, see :func:`route_of`. If the two normalise
            images differently, the batch is converted, see :func:`normalisation_of`.
        reuse: keep the teacher's pyramid while the student is given the very same images, as when several
            subnets are trained in one step. Only for a teacher that does not change in between.
        own_size: give the teacher what the student was called with, a list of images ``[3, H, W]`` in 0..1, so that
            its own transform brings them to its own input size; the same batch, with the same flips. By default it
            sees what the student's transform made of them.
        neck, teacher_neck: dotted names of the submodules that return the pyramids, where they are others than
            ``neck`` or ``backbone``; the teacher's is as the student's unless given.
        student_normalisation, teacher_normalisation: how the images are normalised that reach the backbones, where
            the models do not say it or say something else: ``(mean, std)``, ``(mean, std, scale, order)``, an image
            processor, a :class:`Normalisation`, or ``"same"`` if both get the same images.

    Raises:
        InputError: the two share parameters, so that freezing one would freeze the other; one has no neck; or one
            normalises its images and nothing says how the other does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        reuse: bool = False,
        own_size: bool = False,
        neck: str | None = None,
        teacher_neck: str | None = None,
        student_normalisation: Any = None,
        teacher_normalisation: Any = None,
    ) -> None:
        student, teacher = module_of(student, "student"), module_of(teacher, "teacher")
        self.student, self.teacher = unwrapped(student), unwrapped(teacher)
        self.reuse, self.own_size = reuse, own_size
        _check_apart(self.student, self.teacher)
        self._route = route_of(student, "student", neck)
        theirs = route_of(teacher, "teacher", neck if teacher_neck is None else teacher_neck)
        self.neck, self.watch_pyramid = self._route.neck, self._route.watch_pyramid
        self.writers = self._route.writers
        self._names = tuple(parameters_of(self._route.entrance))
        says = student_normalisation, teacher_normalisation
        self._view = TeacherView(self.teacher, theirs, None if own_size else self._route, says)
        _say_if_compiled(teacher, theirs)
        for model in (self.student, self.teacher):
            set_roi_scales_of(model)
        self.enabled = True  # whether losses that are computed during the student's forward are wanted
        self._entered = 0
        self._hooks: list[Any] = []
        self._batch: StudentInput | None = None
        self._sizes: list[Size] | None = None  # of the batch's images, and of those that are about to become one
        self._next_sizes: list[Size] | None = None
        self._entered_in = FORWARD  # the pass in which the batch came in
        self._neck_inputs: set[int] = set()  # addresses of the tensors that the neck was given in the last forward
        self._taught: PyramidSnapshot | None = None
        self._images: tuple[tuple[Tensor, int], ...] = ()  # that the student was called with, and their versions
        self._called_in: int | None = None  # the pass in which the student's forward is under way, if it is
        self._same_images = False

    def __enter__(self) -> Self:
        if self._entered == 0:
            hold(self.teacher)  # which may refuse it: then nothing was entered
            hooks = [self._route.entrance.register_forward_pre_hook(Hook(self._see), with_kwargs=True)]
            hooks += self._route.watch_sizes(self._see_sizes)
            if self.reuse or self.own_size:
                how = {"prepend": True, "with_kwargs": True}
                hooks.append(self.student.register_forward_pre_hook(Hook(self._see_images), **how))
                hooks.append(self.student.register_forward_hook(Hook(self._left), always_call=True))
            self._hooks = hooks
        self._entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            for hook in self._hooks:
                hook.remove()
            release(self.teacher)
            self._hooks, self._images = [], ()
            self._batch = self._taught = self._sizes = self._next_sizes = None

    @property
    def device(self) -> torch.device:
        return self._seen().images.device

    def compared(
        self,
        batches: Iterable[Any],
        levels: Sequence[int] | None,
        channels: TeacherChannels | None = None,
        call: Callable[[Any], Any] | None = None,
    ) -> Generator[list[LevelPair]]:
        """The levels of each of other batches, in evaluation mode until it is exhausted or closed."""
        with mode(self.student, training=False), mode(self.teacher, training=False):
            yield from compared(self.student, self._route, self._view, batches, channels, levels, call)

    def of_student(self, pyramid: Pyramid) -> PyramidSnapshot:
        """What the student made of its last batch.

        Args:
            pyramid: what its neck has returned.
        """
        return PyramidSnapshot.of(found_levels(pyramid, "student"), self._seen(), self._sizes)

    @property
    def of_teacher(self) -> PyramidSnapshot:
        """What the teacher makes of the student's last batch; kept only where it may be asked for again."""
        if self._taught is not None:
            return self._taught
        if self.teacher.training:  # a container that holds both may have put it there
            self.teacher.eval()
        taught = self._view(self._seen(), self._sizes, [image for image, _ in self._images])
        if self.reuse or self._entered > 1:
            self._taught = taught
        return taught

    def check_batch_of(self, neck_inputs: tuple[Any, ...]) -> None:
        """Refuses to teach a neck that a checkpoint recomputes for another forward than the last.

        Args:
            neck_inputs: what the student's neck was called with.

        Raises:
            InputError: it is not what it was called with in the last forward, and the images did not come in again.
        """
        if not (addresses := addresses_of(neck_inputs)):
            return
        now = pass_number()
        if now == FORWARD:
            self._neck_inputs = addresses
        elif self._entered_in != now and addresses.isdisjoint(self._neck_inputs):
            raise InputError(
                f"the student ({type(self.student).__name__}) recomputes its {type(self.neck).__name__} for images "
                f"that came into its {type(self._route.entrance).__name__} outside the checkpoint, and there is no "
                "telling whether the teacher saw the same last; let the checkpoint begin at the images or at the "
                f"{type(self.neck).__name__}, and call backward after each forward"
            )

    def _seen(self) -> StudentInput:
        if self._batch is None:
            raise RuntimeError("the student has not seen a batch since its teacher was attached: call it first")
        return self._batch

    def _see(self, entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = StudentInput.of(self._names, args, kwargs)
        if batch is None or (batch.sizes and entered is not self._route.chain[-1]):  # lists are for whole detectors
            if not self.student.training:
                return
            given = next(iter((*args, *kwargs.values())), None)
            got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise InputError(
                f"the student's {type(entered).__name__} was given {got}, and the teacher needs the same images as a "
                "tensor [N, 3, H, W]; give the student a backbone that is called with one"
            )
        before, self._entered_in = self._batch, pass_number()
        recomputed = before is not None and self._entered_in != FORWARD and _same(before, batch)
        sizes = self._next_sizes
        if sizes is None and recomputed:  # the checkpoint began after the transform
            sizes = self._sizes
        as_before = before is not None and (before.images.shape, self._sizes) == (batch.images.shape, sizes)
        keep = self._same_images and (self.own_size or as_before)
        self._same_images = False
        if self.own_size and self.student.training and self._called_in != self._entered_in and not recomputed:
            raise InputError(
                f"the student's {type(entered).__name__} ran outside of the forward of {type(self.student).__name__}, "
                "so there is no telling which images its teacher is to see at its own size; call the student itself, "
                "and let a checkpoint begin there or backward follow each forward"
            )
        self._sizes, self._next_sizes, self._batch = sizes, None, batch
        if not keep:
            self._taught = None

    def _see_sizes(self, sizes: list[Size] | None) -> None:
        self._next_sizes = sizes

    def _see_images(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = tuple((image, _version(image)) for image in listed_images(args, kwargs))
        if self.own_size and student.training and not images:
            raise InputError(
                f"the student ({type(student).__name__}) was called without a list of images [3, H, W], which its "
                "teacher needs to see them at its own size; call it with one, as torchvision's detectors are called "
                "(jdkd.detect.adopt makes one of others), or leave own_size out"
            )
        before, self._called_in = self._images, pass_number()
        self._same_images = 0 < len(images) == len(before) and all(
            image is other and version == seen != UNCOUNTED
            for (image, version), (other, seen) in zip(images, before, strict=True)
        )
        self._images = images
        if not self._same_images:  # at once, as the forward may fail before it sees them, and be repeated
            self._taught = None

    def _left(self, student: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._called_in = None


def _version(image: Tensor) -> int:
    counted = torch.compiler.is_compiling() or not image.is_inference()
    return image._version if counted else UNCOUNTED


def _same(before: StudentInput, now: StudentInput) -> bool:
    """Whether the very same images came in again; of a list, which is copied, there is no telling."""
    return torch.compiler.is_compiling() or before.images.data_ptr() == now.images.data_ptr()


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    remedy = "teach with a copy of the teacher (copy.deepcopy)."
    if student is teacher:
        raise InputError(f"teacher and student are one and the same {type(student).__name__}; {remedy}")
    for outer, inner, who in ((student, teacher, "student"), (teacher, student, "teacher")):
        if any(module is inner for module in outer.modules()):
            raise InputError(
                f"the {who} ({type(outer).__name__}) holds the other detector ({type(inner).__name__}) as a submodule; "
                f"pass as the {who} the detector in it that is meant, not the module that holds both"
            )
    shared = {id(parameter) for parameter in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in shared:
            raise InputError(f"teacher and student share the parameter {name}; {remedy}")


def _say_if_compiled(teacher: nn.Module, route: Route) -> None:
    """A teacher that was compiled as a whole cannot be run up to its neck as such."""
    holds = (m for m in teacher.modules() if m is not route.entrance and any(p is route.entrance for p in m.modules()))
    if any(map(is_compiled, holds)):
        say_once(
            "the teacher was compiled as a whole, and runs uncompiled: distillation needs it up to its neck alone; "
            "compile its backbone instead (teacher.backbone.compile())"
        )
