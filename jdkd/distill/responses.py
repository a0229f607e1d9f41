"""What the channels of two pyramids respond to, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot, aligned_pairs
from jdkd.distill.correlation import pearson_r
from jdkd.distill.levels import LevelPair
from jdkd.distill.regression import Regression
from jdkd.distill.route import module_of, route_of
from jdkd.distill.teacher_view import TeacherView
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.reference.pearson import join, moments

Key: TypeAlias = tuple[int, int]  # stride of a pair of levels, and its place among the pairs


class LevelResponses(NamedTuple):
    """One level of a student beside that of its teacher, channel by channel.

    Args:
        stride: in pixels.
        r: ``[C]``, Pearson's correlation of each channel with the teacher's over all images and positions; a channel
            that never changes correlates with nothing (0).
        student, teacher: ``[C, H, W]`` of the first image, every channel less its mean over all images and over its
            standard deviation; where it has none, 0.
        mapped: channels of the student, where these are not as many as the teacher's: then the student's are what a
            1x1 convolution makes of them that predicts the teacher's best on these images. Else None.
    """

    stride: int
    r: Tensor
    student: Tensor
    teacher: Tensor
    mapped: int | None


@torch.no_grad()
def responses(student: nn.Module, teacher: nn.Module, images: Sequence[Tensor]) -> list[LevelResponses]:
    """What PKD compares (Cao et al., NeurIPS 2022, figure 1): standardised channels of two pyramids, level by level.

    Both detectors see every image by itself and at their own input size; the student's levels are brought to the
    teacher's places.

    Args:
        student, teacher: detectors that take a list of images, as torchvision's do; run in evaluation mode up to the
            neck.
        images: ``[3, H, W]`` in 0..1, of any sizes.

    Returns:
        The levels that both have, the finest first.

    Raises:
        InputError: there is no image, or no level matches.
    """
    if not images:
        raise InputError("responses was given 0 images and needs at least 1; give it some.")
    student, teacher = unwrapped(module_of(student, "student")), unwrapped(module_of(teacher, "teacher"))
    look = _Look(student, teacher)
    with mode(student, training=False), mode(teacher, training=False):
        first, extents = look(images[0])
        maps = _fitted(look, images) if any(_differs(pair) for pair in first.values()) else {}
        sums: dict[Key, Tensor] = {}  # [6, C] of each level
        for image in images:
            for key, pair in _through(maps, look(image)[0]).items():
                found = moments([pair.student.double()], [pair.teacher.double()])
                sums[key] = found if key not in sums else join(torch.stack((sums[key], found)))
        shown = _through(maps, first)
        return [_of_level(first[key], shown[key], sums[key], extents[key]) for key in first]


class _Look:
    """Pairs of levels that two detectors make of an image, and how far the image goes in each."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.route = student, route_of(student, "student")
        self.view = TeacherView(teacher, route_of(teacher, "teacher"), None)

    def __call__(self, image: Tensor) -> tuple[dict[Key, LevelPair], dict[Key, tuple[int, int]]]:
        device = next((parameter.device for parameter in self.student.parameters()), image.device)
        seen, ours = self.route.look(self.student, [image.to(device)], "student")
        theirs = self.view(seen, ours.sizes, [image])
        found = aligned_pairs(ours, theirs, channels=None)
        pairs = {(pair.stride, place): pair for place, pair in enumerate(found)}
        return pairs, {key: _extent(theirs, pair) for key, pair in pairs.items()}


def _extent(theirs: PyramidSnapshot, pair: LevelPair) -> tuple[int, int]:
    """Rows and columns of a level that are not of padding alone."""
    height, width = (math.ceil(side / pair.stride) for side in theirs.sizes[0])
    rows, columns = pair.teacher.shape[-2:]
    return min(height, rows), min(width, columns)


def _differs(pair: LevelPair) -> bool:
    return pair.teacher.shape[1] != pair.student.shape[1]


def _fitted(look: _Look, images: Sequence[Tensor]) -> dict[Key, Tensor]:
    """``[C_t, C_s]`` for every level whose widths differ."""
    regressions: dict[Key, Regression] = {}
    for image in images:
        for key, pair in look(image)[0].items():
            if _differs(pair):
                prior = pair.student.new_zeros(pair.teacher.shape[1], pair.student.shape[1])
                regressions.setdefault(key, Regression(prior)).add(pair.student, pair.teacher)
    return {key: regression.solved()[0] for key, regression in regressions.items()}


def _through(maps: Mapping[Key, Tensor], pairs: Mapping[Key, LevelPair]) -> dict[Key, LevelPair]:
    """The pairs, the student's levels in the teacher's channels."""
    return {
        key: pair._replace(student=torch.einsum("ts,nshw->nthw", maps[key], pair.student.to(maps[key].dtype)))
        if key in maps
        else pair
        for key, pair in pairs.items()
    }


def _of_level(own: LevelPair, pair: LevelPair, sums: Tensor, extent: tuple[int, int]) -> LevelResponses:
    count, mean_s, mean_t, ss, tt, _ = sums  # [C] each
    r = pearson_r(sums).clamp(-1, 1)
    rows, columns = extent
    standardised = []
    for level, mean, square in ((pair.student, mean_s, ss), (pair.teacher, mean_t, tt)):
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        values = (level[0].double() - mean[:, None, None]) / deviation[:, None, None]
        values = torch.where(deviation[:, None, None] > 0, values, 0.0)
        standardised.append(values[:, :rows, :columns].float().cpu())
    ours = own.student.shape[1]
    return LevelResponses(own.stride, r.cpu(), *standardised, mapped=None if ours == len(r) else ours)
