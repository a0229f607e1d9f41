"""Does this teacher match? The correlation of two pyramids, measured without training."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.distill.levels import as_index, as_strides, check_index, pair_levels, select_channels
from jdkd.distill.neck import found_levels
from jdkd.distill.route import BACKBONE, module_of, route_of
from jdkd.distill.teacher import conversion_between
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped


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
    from jdkd.train.inputs import normalised
    from jdkd.train.modes import mode

    model = _detector(model, "model")
    with mode(model, training=False):
        return [_seen(model, normalised(model, batch)) for batch in batches]


@torch.no_grad()
def correlations(
    student: nn.Module,
    teacher: nn.Module | Sequence[PyramidSnapshot],
    batches: Iterable[Any],
    channels: Tensor | Sequence[int] | None = None,
    levels: Sequence[int] | None = None,
    *,
    own_size: bool = False,
) -> dict[int, float]:
    """How far a student's features are from a teacher's: 1 - r per level, what PKD would start from.

    Pearson's r is taken per channel over all images and positions of all batches together and averaged over
    channels. 0 is a teacher with nothing left to say, about 1 one whose features have nothing to do with the
    student's. A channel that never changes correlates with nothing (r = 0).

    Args:
        student, teacher: detectors with a ``backbone`` that returns a pyramid, in torch's wrappers or not; run in
            evaluation mode. Instead of the teacher, what :func:`pyramids` made of it and of the same batches, at its
            own input size.
        batches: ``(images, targets)``, lists of images ``[3, H, W]`` in 0..1, or tensors ``[N, 3, H, W]``.
        channels: ``[C_student]``, the teacher's channel opposite each of the student's.
        levels: strides of the levels to compare; by default all that both have, without the pooled one.
        own_size: let the teacher resize the images to its own input size instead of seeing what the student
            sees, so that what a smaller input loses counts too.

    Returns:
        stride -> mean of 1 - r over channels, and over levels where several have one stride.

    Raises:
        InputError: there is no batch, or more than pyramids; no level matches, or channel counts differ; one says how
            it normalises images and the other does not.
    """
    from jdkd.train.inputs import normalised
    from jdkd.train.modes import mode

    index, levels = as_index(channels), as_strides(levels)
    pools: dict[tuple[int, int], _Comoments] = {}  # (stride, place among the levels of that stride)
    student = _detector(student, "student")
    runs = not isinstance(teacher, Sequence) or isinstance(teacher, nn.Module)
    teacher = _detector(teacher, "teacher") if runs else teacher
    convert = None
    if runs and not own_size:
        convert = conversion_between(route_of(student, "student", BACKBONE), route_of(teacher, "teacher", BACKBONE))
    with mode(student, training=False), mode(teacher, training=False) if runs else contextlib.nullcontext():
        for number, batch in enumerate(batches):
            shown = normalised(student, batch)  # [N, 3, H, W]
            index = None if index is None else index.to(shown.device)
            ours = _seen(student, shown)
            if runs:
                teacher.to(shown.device)
                shown = normalised(teacher, batch) if convert is None else convert(shown)
            elif number == len(teacher):
                raise InputError(f"correlations was given {number} pyramids and more batches; give one for each batch.")
            theirs = _seen(teacher, shown) if runs else teacher[number]
            pairs = pair_levels(ours.pyramid, theirs.pyramid, ours.size, levels, teacher_size=theirs.size)
            check_index(index, pairs)
            for place, pair in enumerate(pairs):
                pools.setdefault((pair.stride, place), _Comoments()).take(pair.student, select_channels(pair, index))
    if not pools:
        raise InputError("correlations was given 0 batches and needs at least 1; give it some images.")
    distances: dict[int, list[float]] = {}
    for (stride, _), pool in sorted(pools.items()):
        distances.setdefault(stride, []).append(pool.distance())
    return {stride: sum(values) / len(values) for stride, values in distances.items()}


def _detector(model: Any, who: str) -> nn.Module:
    """The detector inside torch's wrappers, whose backbone is to be run.

    Raises:
        InputError: it is none, or has no backbone of its own.
    """
    inner = unwrapped(module_of(model, who))
    if not isinstance(getattr(inner, BACKBONE, None), nn.Module):
        raise InputError(
            f"the {who} ({type(inner).__name__}) has no {BACKBONE} of its own, and correlations runs that; pass the "
            "detector inside"
        )
    return inner


def _seen(model: nn.Module, batch: Tensor) -> PyramidSnapshot:
    """The pyramid of a normalised batch ``[N, 3, H, W]``."""
    return PyramidSnapshot(found_levels(model.backbone(batch), type(model).__name__), tuple(batch.shape[-2:]))


@dataclass
class _Comoments:
    """Count, means and centred sums of two signals per channel, merged batch by batch in float64.

    Chan, Golub and LeVeque (1983), here with the sum of products beside the sums of squares.
    """

    count: int = 0
    means: Tensor | None = None  # [2, C]
    sums: Tensor | None = None  # [3, C]: of squares of the student, of the teacher, of products

    def take(self, ours: Tensor, theirs: Tensor) -> None:
        """Merges a batch of one level, ``[N, C, H, W]`` each; a student of another size is resized."""
        if ours.shape[-2:] != theirs.shape[-2:]:
            ours = nn.functional.interpolate(ours, size=theirs.shape[-2:], mode="bilinear")
        both = torch.stack((ours, theirs)).double().transpose(1, 2).flatten(2)  # [2, C, N*H*W]
        count, means = both.shape[2], both.mean(dim=2)
        both = both - means[..., None]
        sums = torch.stack(((both[0] ** 2).sum(1), (both[1] ** 2).sum(1), (both[0] * both[1]).sum(1)))
        if not self.count:
            self.count, self.means, self.sums = count, means, sums
            return
        total, shift = self.count + count, means - self.means
        crossed = torch.stack((shift[0] ** 2, shift[1] ** 2, shift[0] * shift[1]))
        self.sums = self.sums + sums + crossed * (self.count * count / total)
        self.means = self.means + shift * (count / total)
        self.count = total

    def distance(self) -> float:
        """Mean of 1 - r over channels."""
        squares = self.sums[0] * self.sums[1]
        r = torch.where(squares > 0, self.sums[2] / squares.sqrt(), 0.0)  # [C]
        return float((1 - r).mean())
