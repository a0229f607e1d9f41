"""What two detectors made of the same images, brought to the same places in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd.distill.channels import TeacherChannels
from jdkd.distill.levels import EVERY, LevelPair, pair_levels
from jdkd.distill.student_input import StudentInput
from jdkd.ops.pearson_strides import Size


class PyramidSnapshot(NamedTuple):
    """What a detector made of one batch.

    Args:
        pyramid: name -> level ``[N, C, H, W]``.
        size: height and width in pixels of what its backbone saw.
        sizes: of every image in that before it was padded, as far as the detector says so.
        inside: bool ``[N, H, W]``, True where the images are, where a mask says so instead.
    """

    pyramid: Mapping[str, Tensor]
    size: Size
    sizes: tuple[Size, ...]
    inside: Tensor | None = None

    @classmethod
    def of(
        cls, pyramid: Mapping[str, Tensor], seen: StudentInput, sizes: Sequence[Size] | None = None
    ) -> PyramidSnapshot:
        """Of what went into a backbone, and the sizes of the images if they are known from elsewhere."""
        known = sizes if sizes is not None and len(sizes) == len(seen.images) else seen.sizes
        size = tuple(seen.images.shape[-2:])
        return cls(pyramid, size, tuple(known) or (size,) * len(seen.images), None if known else seen.inside)

    def extents(self) -> Tensor:
        """``[N, 2]``, height and width in pixels of every image, without what it was padded with."""
        device = next(iter(self.pyramid.values())).device
        if self.inside is not None:
            return torch.stack([self.inside.any(dim).sum(1) for dim in (2, 1)], dim=1).float().to(device)
        return torch.tensor(self.sizes, dtype=torch.float32).to(device, non_blocking=True)


def size_ratio(ours: PyramidSnapshot, theirs: PyramidSnapshot) -> Tensor | None:
    """``[N, 2]``, how many pixels one detector saw for one of the other's, downwards and across; None if as many."""
    if (ours.size, ours.sizes) == (theirs.size, theirs.sizes):
        return None
    return ours.extents() / theirs.extents()


def aligned_pairs(
    ours: PyramidSnapshot,
    theirs: PyramidSnapshot,
    levels: Sequence[int] | None = None,
    channels: TeacherChannels | None = EVERY,
) -> list[LevelPair]:
    """The levels of a student and a teacher that are compared, see :func:`pair_levels`; where the two saw the images in
    different sizes, the student's are brought to the teacher's places.
    """
    sizes = {"size": ours.size, "teacher_size": theirs.size}
    pairs = pair_levels(ours.pyramid, theirs.pyramid, levels=levels, channels=channels, **sizes)
    ratio = size_ratio(ours, theirs)
    if ratio is None:
        return pairs
    return [pair._replace(student=resampled(pair.student, tuple(pair.teacher.shape[-2:]), ratio)) for pair in pairs]


def resampled(level: Tensor, size: Size, ratio: Tensor) -> Tensor:
    """A level at the places that another one of the same stride has, where the images were of another size.

    Bilinear, as :func:`torch.nn.functional.interpolate` is, but from image to image instead of from edge to edge: a
    batch is padded to a multiple of the stride, by other fractions at other sizes. Two products with matrices of hat
    functions, so that the gradient is deterministic on a GPU too.

    Args:
        level: ``[N, C, H, W]``.
        size: height and width of the other level.
        ratio: ``[N, 2]``, pixels of this level's images for one of the other's.

    Returns:
        ``[N, C, *size]`` in float32, or float64.
    """
    level = level.to(torch.promote_types(level.dtype, torch.float32))
    with torch.autocast(level.device.type, enabled=False):
        hats = (_hats(ratio[:, axis].to(level.dtype), level.shape[2 + axis], size[axis]) for axis in (0, 1))
        rows, columns = hats  # [N, H', H], [N, W', W]
        across = torch.bmm(level.flatten(1, 2), columns.mT).unflatten(1, level.shape[1:3])  # [N, C, H, W']
        return rows[:, None] @ across


def _hats(ratio: Tensor, before: int, after: int) -> Tensor:
    """``[N, after, before]``, what every place before counts for at every place after."""
    places = torch.arange(after, device=ratio.device, dtype=ratio.dtype)
    at = ((places + 0.5) * ratio[:, None] - 0.5).clamp(0, before - 1)  # [N, after]
    return (1 - (at[..., None] - places.new_tensor(range(before))).abs()).clamp(min=0)
