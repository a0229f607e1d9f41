"""Does this teacher match? The correlation of two pyramids, measured without training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot, aligned_pairs
from jdkd.distill.channels import Channels, TeacherChannels
from jdkd.distill.levels import LevelPair, as_strides
from jdkd.distill.regression import Regression
from jdkd.distill.route import Route, module_of, route_of
from jdkd.distill.student_input import parameters_of
from jdkd.distill.teacher_view import TeacherView
from jdkd.errors import InputError, require_batches
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.reference.pearson import join, moments


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
        return [route.look(model, images_on(model, batch), "model")[1] for batch in batches]


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
    sums: dict[tuple[int, int], Tensor] = {}  # [6, C], by stride and place among the pairs
    wanted = TeacherChannels(channels), as_strides(levels)
    student = unwrapped(module_of(student, "student"))
    route = route_of(student, "student")
    look: TeacherView | _Snapshots
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode(student, training=False))
        if isinstance(teacher, nn.Module) or not isinstance(teacher, Sequence):
            teacher = unwrapped(module_of(teacher, "teacher"))
            look = TeacherView(teacher, route_of(teacher, "teacher"), None if own_size else route)
            stack.enter_context(mode(teacher, training=False))
        else:
            look = _Snapshots(teacher)
        for pairs in compared(student, route, look, batches, *wanted):
            for place, pair in enumerate(pairs):
                found = moments([pair.student.double()], [pair.teacher.double()])
                before = sums.get((pair.stride, place))
                sums[pair.stride, place] = found if before is None else join(torch.stack((before, found)))
    require_batches(sums, "correlations")
    return mean_by_stride({key: float((1 - pearson_r(pooled)).mean()) for key, pooled in sums.items()})


@torch.no_grad()
def explained(students: Sequence[PyramidSnapshot], teachers: Sequence[PyramidSnapshot]) -> float:
    """How much of a teacher's features an adapter could say in a student's: Pearson's r between the teacher's channels
    and their best linear prediction, mean over channels, then over levels.

    Args:
        students, teachers: what the two made of the same batches, see :func:`pyramids`.

    Raises:
        InputError: no level matches.
    """
    regressions: dict[tuple[int, int], Regression] = {}  # by stride and place among the pairs
    for ours, theirs in zip(students, teachers, strict=True):
        for place, pair in enumerate(aligned_pairs(ours, theirs, channels=None)):
            prior = pair.student.new_zeros(pair.teacher.shape[1], pair.student.shape[1])
            regressions.setdefault((pair.stride, place), Regression(prior)).add(pair.student, pair.teacher)
    return sum(1 - regression.distance() for regression in regressions.values()) / len(regressions)


def compared(
    student: nn.Module,
    route: Route,
    look: TeacherView | _Snapshots,
    batches: Iterable[Any],
    channels: TeacherChannels | None,
    levels: Sequence[int] | None,
    call: Callable[[Any], Any] | None = None,
) -> Iterator[list[LevelPair]]:
    """The levels of each batch that are compared, see :func:`aligned_pairs`.

    Args:
        student, route: in evaluation mode, and the way of the images through it.
        look: how its teacher sees a batch.
        batches: as :func:`correlations` takes them.
        channels, levels: see :func:`aligned_pairs`.
        call: runs the student on a batch; by default it is called with the batch's images, or, where that is a mapping,
            with its entries, or with that itself where it has no parameters of these names.
    """
    from jdkd.train.inputs import images_of, images_on

    for batch in batches:
        if call is None and not isinstance(batch, Mapping):
            given: Sequence[Tensor] = [*images_of(batch)]
            seen, ours = route.look(student, images_on(student, batch), "student")
        else:
            named = isinstance(batch, Mapping) and not batch.keys().isdisjoint(parameters_of(student))
            run = partial(student, **batch) if call is None and named else partial(call or student, batch)
            seen, ours = route.observe(run, student, "student")
            given = []
        yield aligned_pairs(ours, look(seen, ours.sizes, given), levels, channels)


def mean_by_stride(distances: Mapping[tuple[int, int], float]) -> dict[int, float]:
    """stride -> mean over the levels of that stride, of values by stride and place; finest first."""
    values: dict[int, list[float]] = {}
    for stride, place in sorted(distances):
        values.setdefault(stride, []).append(distances[stride, place])
    return {stride: sum(found) / len(found) for stride, found in values.items()}


class _Snapshots:
    """What a teacher made of the batches, one by one."""

    def __init__(self, snapshots: Sequence[PyramidSnapshot]) -> None:
        self.count, self.left = len(snapshots), iter(snapshots)

    def __call__(self, *batch: Any) -> PyramidSnapshot:
        for snapshot in self.left:
            return snapshot
        raise InputError(f"correlations was given {self.count} pyramids and more batches; give one for each batch.")


def pearson_r(sums: Tensor) -> Tensor:
    """``[C]``, r by channel of its :func:`jdkd.reference.pearson.moments` ``[6, C]``; 0 where one never changes."""
    *_, ours, theirs, products = sums  # [C] each
    squares = ours * theirs
    return torch.where(squares > 0, products / squares.sqrt(), 0.0)
