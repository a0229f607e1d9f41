"""How a teacher sees a batch: as its student's backbone did, or at its own input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot
from jdkd.distill.arrival import check_arrival, check_unsaid
from jdkd.distill.neck import found_levels
from jdkd.distill.normalisation import (
    SAME,
    Conversion,
    Normalisation,
    conversion,
    normalisation_from,
    normalisation_of,
)
from jdkd.distill.route import Route
from jdkd.distill.student_input import StudentInput
from jdkd.errors import InputError
from jdkd.ops.pearson_strides import Size


class TeacherView:
    """Runs a teacher up to its neck, without a graph, on its student's device.

    Under ``torch.no_grad``, not ``torch.inference_mode``. What is made there can be saved for no backward pass, and
    count no versions: the squared error saves a teacher's levels, as does whatever is compiled, and a level that is
    overwritten too soon would give wrong gradients without an error. A table that a teacher makes in its first forward
    and keeps would spoil any later training of it.

    Args:
        teacher: in evaluation mode whenever this is called.
        route: the way of the images through it.
        student: the way through the student, whose backbone's images it is to see, converted to its normalisation;
            None: it sees what the student was given, through its own transform.
        says: how the images of student and teacher are normalised, see :func:`conversion_between`.
    """

    def __init__(
        self, teacher: nn.Module, route: Route, student: Route | None, says: tuple[Any, Any] = (None, None)
    ) -> None:
        self.teacher, self.route = teacher, route
        self._convert = None
        if student is not None:
            self._convert = conversion_between(student, route, *says)
        else:
            check_arrival(route, _said(route, says[1]), "teacher", own_size=True)

    @torch.no_grad()
    def __call__(self, seen: StudentInput, sizes: Sequence[Size] | None, given: Sequence[Tensor]) -> PyramidSnapshot:
        """What the teacher makes of a batch.

        Args:
            seen: what went into the student's backbone.
            sizes: of its images before they were padded, where that is known.
            given: the images that the student was called with, ``[3, H, W]`` in 0..1.
        """
        images = seen.images
        first = next((parameter for parameter in self.teacher.parameters() if parameter.is_floating_point()), images)
        if first.device != images.device:
            self.teacher.to(images.device)
        if self._convert is None:
            own = [image.detach().to(images.device, first.dtype) for image in given]
            return self.route.look(self.teacher, own, "teacher")[1]
        inside = None
        if self._convert.is_needed:
            inside = seen.inside if sizes is None else _inside(sizes, images)
        pyramid = self.route.run(seen, self._convert(images, inside).to(first.dtype))
        return PyramidSnapshot.of(found_levels(pyramid, "teacher"), seen, sizes)


def conversion_between(ours: Route, theirs: Route, student_says: Any = None, teacher_says: Any = None) -> Conversion:
    """The way from the images of a student's backbone to those of a teacher's.

    Args:
        ours, theirs: the ways of the images through both.
        student_says, teacher_says: how they are normalised, see :class:`TeacherRunner`; by default as the models say.

    Raises:
        InputError: one says how it normalises and the other does not, or does another thing than it says; or neither
            says anything, and they do not do the same.
    """
    if SAME in [says for says in (student_says, teacher_says) if isinstance(says, str)]:
        return Conversion(None, None)
    found = []
    for who, route, says in (("student", ours, student_says), ("teacher", theirs, teacher_says)):
        own = says is None
        found.append(normalisation_of(route.chain, route.entrance, who) if own else normalisation_from(says, who))
        if own and found[-1] is not None:
            check_arrival(route, found[-1], who)
    convert = conversion(*found, *(type(route.chain[-1]).__name__ for route in (ours, theirs)))
    if found == [None, None]:
        check_unsaid(ours, theirs)
    return convert


def _said(route: Route, says: Any) -> Normalisation | None:
    """How a teacher that is called itself has its images normalised, if that is said in one way."""
    if isinstance(says, str) and says == SAME:
        return None
    if says is not None:
        return normalisation_from(says, "teacher")
    try:
        return normalisation_of(route.chain, route.entrance, "teacher")
    except InputError:  # what it does itself in several steps is what it was trained on
        return None


def _inside(sizes: Sequence[Size], images: Tensor) -> Tensor | None:
    """bool ``[N, H, W]``, True where the images of these sizes are; None if they are not those of the batch."""
    if len(sizes) != len(images):
        return None
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(length, device=images.device) for length in (height, width))
    sides = torch.tensor(sizes).to(images.device, non_blocking=True)  # [N, 2]
    return (rows < sides[:, :1])[:, :, None] & (columns < sides[:, 1:])[:, None, :]
