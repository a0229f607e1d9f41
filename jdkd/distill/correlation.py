"""Does this teacher match? The correlation of two pyramids, measured without training."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.distill.channels import Channels, TeacherChannels
from jdkd.distill.levels import as_strides, pair_levels
from jdkd.distill.neck import Pyramid, found_levels
from jdkd.distill.route import Route, module_of, route_of
from jdkd.distill.student_input import StudentInput
from jdkd.distill.teacher import conversion_between
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.reference.pearson import join, moments


class PyramidSnapshot(NamedTuple):
    """What a detector made of one batch.

    Args:
        pyramid: name -> level ``[N, C, H, W]``.
        size: height and width in pixels of what its backbone saw.
    """

    pyramid: Mapping[str, Tensor]
    size: tuple[int, int]


@torch.no_grad()
def pyramids(model: nn.Module, batches: Iterable[Any]) -> list[PyramidSnapshot]:
    """What a detector makes of each batch at its own input size, for :func:`correlations` of many students with it.

    Args:
        model, batches: as :func:`correlations` takes a teacher and batches.

    Returns:
        One a batch, on the model's device.
    """
    from jdkd.train.inputs import images_on

    model = unwrapped(module_of(model, "model"))
    route = route_of(model, "model")
    with mode(model, training=False):
        return [_snapshot(*route.look(model, images_on(model, batch), "model"), "model") for batch in batches]


@torch.no_grad()
def correlations(
    student: nn.Module,
    teacher: nn.Module | Sequence[PyramidSnapshot],
    batches: Iterable[Any],
    channels: Channels = None,
    levels: Sequence[int] | None = None,
    *,
    own_size: bool = False,
) -> dict[int, float]:
    """How far a student's features are from a teacher's: 1 - r per level, what PKD would start from.

    Pearson's r is taken per channel over all images and positions of all batches together and averaged over
    channels. 0 is a teacher with nothing left to say, about 1 one whose features have nothing to do with the
    student's. A channel that never changes correlates with nothing (r = 0).

    Args:
        student, teacher: detectors that take a list of images, as torchvision's do, in torch's wrappers or not; run in
            evaluation mode up to the neck. Instead of the teacher, what :func:`pyramids` made of it and of the same
            batches, at its own input size.
        batches: ``(images, targets)``, lists of images ``[3, H, W]`` in 0..1, or tensors ``[N, 3, H, W]``.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's, see :class:`TeacherChannels`.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        own_size: let the teacher resize the images to its own input size instead of seeing what the student
            sees, so that what a smaller input loses counts too.

    Returns:
        stride -> mean of 1 - r over channels, and over levels where several have one stride.

    Raises:
        InputError: there is no batch, or more than pyramids; no level matches, or channel counts differ; one says how
            it normalises images and the other does not.
    """
    from jdkd.train.inputs import images_on

    picked, levels = TeacherChannels(channels), as_strides(levels)
    sums: dict[tuple[int, int], Tensor] = {}  # [6, C], by stride and place among the pairs
    student = unwrapped(module_of(student, "student"))
    route = route_of(student, "student")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode(student, training=False))
        if isinstance(teacher, nn.Module) or not isinstance(teacher, Sequence):
            teacher = unwrapped(module_of(teacher, "teacher"))
            look = _Teacher(teacher, route_of(teacher, "teacher"), None if own_size else route)
            stack.enter_context(mode(teacher, training=False))
        else:
            look = _Snapshots(teacher)
        for batch in batches:
            images = images_on(student, batch)
            seen, pyramid = route.look(student, images, "student")
            ours, theirs = _snapshot(seen, pyramid, "student"), look(seen, batch)
            sizes = {"size": ours.size, "teacher_size": theirs.size}
            pairs = pair_levels(ours.pyramid, theirs.pyramid, levels=levels, channels=picked, **sizes)
            for place, pair in enumerate(pairs):
                key = pair.stride, place
                sums[key] = _joined(sums.get(key), pair.student, pair.teacher)
    if not sums:
        raise InputError("correlations was given 0 batches and needs at least 1; give it some images.")
    distances: dict[int, list[float]] = {}
    for stride, place in sorted(sums):
        distances.setdefault(stride, []).append(_distance(sums[stride, place]))
    return {stride: sum(values) / len(values) for stride, values in distances.items()}


class _Teacher:
    """What a teacher makes of the images that a student saw, or, at its own input size, of a batch.

    Args:
        model: the teacher.
        route: the way of the images through it.
        student: the student's, whose images it is to see.
    """

    def __init__(self, model: nn.Module, route: Route, student: Route | None) -> None:
        self.model, self.route = model, route
        self.convert = None if student is None else conversion_between(student, route)

    def __call__(self, seen: StudentInput, batch: Any) -> PyramidSnapshot:
        from jdkd.train.inputs import images_on

        self.model.to(seen.images.device)
        if self.convert is None:
            return _snapshot(*self.route.look(self.model, images_on(self.model, batch), "teacher"), "teacher")
        pyramid = self.route.run(seen, self.convert(seen.images, seen.inside))
        return PyramidSnapshot(found_levels(pyramid, "teacher"), tuple(seen.images.shape[-2:]))


class _Snapshots:
    """The pyramids of a teacher, batch by batch."""

    def __init__(self, snapshots: Sequence[PyramidSnapshot]) -> None:
        self.count, self.left = len(snapshots), iter(snapshots)

    def __call__(self, seen: StudentInput, batch: Any) -> PyramidSnapshot:
        for snapshot in self.left:
            return snapshot
        raise InputError(f"correlations was given {self.count} pyramids and more batches; give one for each batch.")


def _snapshot(seen: StudentInput, pyramid: Pyramid, who: str) -> PyramidSnapshot:
    return PyramidSnapshot(found_levels(pyramid, who), tuple(seen.images.shape[-2:]))


def _joined(moments_before: Tensor | None, ours: Tensor, theirs: Tensor) -> Tensor:
    """The moments, ``[6, C]``, of what was seen and one more batch of a level, in float64.

    Args:
        moments_before: of the batches before; None before the first.
        ours, theirs: ``[N, C, H, W]``; a student of another size is resized.
    """
    if ours.shape[-2:] != theirs.shape[-2:]:
        ours = nn.functional.interpolate(ours, size=theirs.shape[-2:], mode="bilinear")
    found = moments([ours.double()], [theirs.double()])
    return found if moments_before is None else join(torch.stack((moments_before, found)))


def _distance(sums: Tensor) -> float:
    """Mean of 1 - r over channels."""
    *_, ours, theirs, products = sums  # [C] each
    squares = ours * theirs
    r = torch.where(squares > 0, products / squares.sqrt(), 0.0)  # [C]
    return float((1 - r).mean())
