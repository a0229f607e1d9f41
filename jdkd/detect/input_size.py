"""The size to which a detector resizes its input, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from jdkd.errors import InputError, ModelError
from jdkd.nn.unwrapping import unwrapped


@dataclass(frozen=True)
class Regions:
    """How many regions the two stages of a Faster R-CNN look at.

    Args:
        proposals: an image that survive NMS at inference; training keeps twice as many.
        rois: regions sampled per image to train the box head.
        positives: largest share of them that are objects.
        roi_samples: sampling points per side of each of the 7x7 bins of a region.
    """

    proposals: int = 1000
    rois: int = 512
    positives: float = 0.25
    roi_samples: int = 2

    @classmethod
    def of(cls, min_size: int) -> Regions:
        """torchvision's numbers, or fewer where the short side of an image is below 400 pixels."""
        return cls(300, 64, 0.5, 1) if min_size < 400 else cls()


def smallest_anchor(min_size: int) -> int:
    """Size of the anchors of a pyramid's finest level: 32 pixels where images have 800, and never under 8."""
    smallest = 32
    while smallest > 8 and smallest * 800 > 32 * min_size * 1.5:
        smallest //= 2
    return smallest


def input_transform(model: nn.Module) -> GeneralizedRCNNTransform | None:
    """The torchvision transform of a detector or of the one inside it; None without one."""
    return next((module for module in model.modules() if isinstance(module, GeneralizedRCNNTransform)), None)


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """The short side to which a detector resizes its input, and the most that the long one gets, in pixels.

    Returns:
        None where it does not resize, or to one fixed size (SSD), which its anchors are made for.
    """
    transform = input_transform(model)
    if transform is None or transform.fixed_size is not None:
        return None
    return int(transform.min_size[-1]), int(transform.max_size)  # the last one is for evaluation


def resizes_alike(model: nn.Module, other: nn.Module) -> bool:
    """Whether ``model`` brings an image to the size in training that ``other`` brings it to in evaluation."""
    ours, theirs = input_transform(model), input_transform(other)
    if ours is None or theirs is None:
        return ours is theirs
    if ours.fixed_size is not None or theirs.fixed_size is not None:
        return ours.fixed_size == theirs.fixed_size
    return {*ours.min_size} == {theirs.min_size[-1]} and ours.max_size == theirs.max_size


def size_attributes(model: nn.Module, min_size: int) -> dict[str, Any]:
    """The attributes by which a detector resizes its input to another short side, for :class:`jdkd.rewrite.Rewrite`.

    Args:
        model: a detector with an :func:`input_size`.
        min_size: pixels of the short side in evaluation; those of training and the long side's limit follow.

    Raises:
        InputError: it has none, or ``min_size`` is no positive whole number.
    """
    if not isinstance(min_size, int) or min_size < 1:
        raise InputError(
            f"min_size is the short side of the input in pixels, a positive whole number, got {min_size!r}."
        )
    now, inner = input_size(model), unwrapped(model)
    if now is None:
        raise InputError(
            f"this {type(inner).__name__} has no input size of its own that could be {min_size} px: it takes images as "
            "they are, or resizes them to one fixed size; build it for another size instead."
        )
    transform = input_transform(inner)
    path = next(name for name, module in inner.named_modules() if module is transform)
    return {
        f"{path}.min_size": tuple(max(1, round(side * min_size / now[0])) for side in transform.min_size),
        f"{path}.max_size": max(min_size, round(now[1] * min_size / now[0])),
    }


@contextmanager
def training_sizes(model: nn.Module, sizes: Sequence[int] | None) -> Iterator[None]:
    """Lets a detector resize each image of a training to one of several sizes, drawn anew; then it is as it was.

    Args:
        model: a detector with torchvision's transform.
        sizes: short sides in pixels; where they are above the detector's own, the limit of the long side grows with
            the largest. None changes nothing.

    Raises:
        InputError: it has no such transform, or resizes to one fixed size.
    """
    require_resizing(model, sizes)
    if not sizes:
        yield
        return
    transform = input_transform(model)
    own = transform.min_size, transform.max_size
    limit = round(own[1] * max(sizes) / input_size(model)[0])
    transform.min_size, transform.max_size = tuple(sizes), max(own[1], limit, *sizes)
    try:
        yield
    finally:
        transform.min_size, transform.max_size = own


def sizes_in_proportion(sizes: Sequence[int], model: nn.Module, like: nn.Module) -> tuple[int, ...]:
    """Sizes to train one detector at, for another: as far from its input size as they are from the other's.

    Args:
        sizes: short sides in pixels that ``like`` is trained at.
        model, like: detectors with an :func:`input_size`.
    """
    share = input_size(model)[0] / input_size(like)[0]
    return tuple(max(1, round(size * share)) for size in sizes)


def require_resizing(model: nn.Module, sizes: Sequence[int] | None) -> None:
    """Refuses sizes to train at for a detector that :func:`training_sizes` cannot give them to.

    Raises:
        InputError: there are some, and it does not resize its input, or to one fixed size.
    """
    if sizes and input_size(model) is None:
        raise InputError(
            f"{type(unwrapped(model)).__name__} takes images as they are, or resizes them to one fixed size; leave the "
            "sizes to train at out."
        )


def require_whole(numbers: Mapping[str, Any]) -> None:
    """Refuses what is no whole number of at least 1.

    Raises:
        InputError: names the first of them.
    """
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {number!r}.")


def require_order(min_size: int, max_size: int) -> None:
    """Refuses a limit of the long side below the short side.

    Raises:
        InputError: it is.
    """
    if max_size < min_size:
        raise InputError(f"max_size {max_size} is below min_size {min_size}; give both, the larger one as max_size.")


def require_visible(model: nn.Module, sizes: Iterable[tuple[str, int, int]], who: str = "", remedy: str = "") -> None:
    """Refuses images of which a detector's transform would leave no pixel: so long that the short side is resized to 0.

    Args:
        model: a detector; without a torchvision transform everything passes.
        sizes: (name, height, width) of every image.
        who: what errors call it besides its kind, such as "the teacher".
        remedy: what else would help, for the message.

    Raises:
        ModelError: names the first of them and says how many there are.
    """
    transform = input_transform(model)
    if transform is None or transform.fixed_size is not None:
        return
    least, most = min(transform.min_size), transform.max_size
    gone = [
        (name, height, width)
        for name, height, width in sizes
        if min(least / min(height, width), most / max(height, width)) * min(height, width) < 1
    ]
    if gone:
        name, height, width = gone[0]
        kind = type(unwrapped(model)).__name__
        raise ModelError(
            f"{name} is {height}x{width} (height x width), of which {f'{who} ({kind})' if who else kind} leaves no "
            f"pixel on the short side when it resizes the long one to max_size {most} ({len(gone)} such image(s)); "
            f"raise max_size to {-(-max(height, width) // min(height, width))} or more, "
            f"{f'{remedy}, ' if remedy else ''}or crop or leave out such images"
        )
