"""See :func:`swap_features`."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.detect.architecture import architecture_of
from jdkd.detect.input_size import input_size
from jdkd.detect.roi_scales import probed_levels
from jdkd.errors import InputError
from jdkd.nn.necks import BACKBONE
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import say_once
from jdkd.rewrite import describe
from jdkd.rewrite.building import call

BUILDER = "jdkd.detect:swapped"
FEATURES = (BACKBONE, "transform")  # what belongs to the features of a torchvision detector; all else is its head

Levels = Mapping[str, Sequence[Any]]  # name -> name of the level that it is made of, and how many octaves coarser


def swap_features(features: nn.Module, head: nn.Module) -> nn.Module:
    """A detector with the backbone and neck of one and the heads of another (PKD, section 3.1: do features transfer?).

    The images are resized and normalised as the features' detector does it. Levels are matched by stride; one that the
    features do not have is the nearest of them, every second position of it or each position twice.

    Args:
        features, head: detectors of torchvision's make (a ``backbone`` that returns the levels, and a ``transform``),
            with their ``architecture``; both are left as they were.

    Returns:
        The detector, in the mode of ``head``, with all weights as they were and an ``architecture`` that
        :func:`jdkd.detect.load` can build.

    Raises:
        InputError: one is of another make, or the levels of the two have other numbers of channels.
    """
    features, head = unwrapped(features), unwrapped(head)
    ours, theirs = (architecture_of(model, "swap_features") for model in (head, features))
    levels = _levels(_probed(features, "features"), _probed(head, "head"))
    if (sizes := (input_size(features), input_size(head)))[0] != sizes[1]:
        told = ["as they are" if size is None else f"resized to {size[0]} (at most {size[1]}) pixels" for size in sizes]
        say_once(f"the head, which was trained on images {told[1]}, gets them as the features do, {told[0]}")
    inner = {"builder": theirs.builder, "arguments": dict(theirs.arguments)}
    arguments = {"builder": ours.builder, "arguments": dict(ours.arguments), "features": inner, "levels": levels}
    made: Any = _exchanged(copy.deepcopy(head), copy.deepcopy(features), levels)
    made.architecture = describe(made, BUILDER, arguments, classes=ours.classes)
    return made


def swapped(
    builder: str, arguments: Mapping[str, Any], features: Mapping[str, Any], levels: Levels | None = None
) -> nn.Module:
    """What :func:`swap_features` makes, with fresh weights: what architectures name.

    Args:
        builder, arguments: of the head's detector.
        features: ``builder`` and ``arguments`` of the other.
        levels: of the head, name -> the features' level that it is made of, and how many octaves coarser it is; None
            where the two have the same.
    """
    return _exchanged(call(builder, arguments), call(features["builder"], features["arguments"]), levels)


class Relevelled(nn.Module):
    """A backbone whose levels have the names and strides that other heads read.

    Args:
        inner: returns its levels by name.
        levels: name -> name of the level that it is made of, and how many octaves coarser it is (finer: below 0).
    """

    def __init__(self, inner: nn.Module, levels: Levels) -> None:
        super().__init__()
        self.inner = inner
        self.levels = [[name, source, octaves] for name, (source, octaves) in levels.items()]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:  # [N, 3, H, W] -> [N, C, H / stride, W / stride] each
        found = self.inner(x)
        return OrderedDict((name, _scaled(found[source], octaves)) for name, source, octaves in self.levels)


def _scaled(level: Tensor, octaves: int) -> Tensor:
    """A level of a coarser stride, as torchvision's pooled levels are, or of a finer one."""
    for _ in range(octaves):
        level = F.max_pool2d(level, 1, 2)
    return F.interpolate(level, scale_factor=2.0**-octaves, mode="nearest") if octaves < 0 else level


def _exchanged(model: nn.Module, other: nn.Module, levels: Levels | None) -> nn.Module:
    for name in FEATURES:
        setattr(model, name, getattr(other, name))
    if levels is not None:
        setattr(model, BACKBONE, Relevelled(getattr(other, BACKBONE), levels))
    return model


def _probed(model: nn.Module, who: str) -> dict[str, tuple[int, int]]:
    """Stride and channels of every level, by name.

    Raises:
        InputError: the model has not the parts that are exchanged, or its backbone returns no such levels.
    """
    kind = type(model).__name__
    if missing := [name for name in FEATURES if not isinstance(getattr(model, name, None), nn.Module)]:
        raise InputError(
            f"the detector that gives the {who} ({kind}) has no {' and no '.join(missing)} of its own; give one of "
            "torchvision's make, whose backbone and transform are not parts of its heads"
        )
    levels = probed_levels(model)
    if len(levels) < 2:
        raise InputError(
            f"the backbone of the detector that gives the {who} ({kind}) returns no pyramid of levels by name for a "
            "square image; give a detector whose neck does"
        )
    return {name: (2 ** round(math.log2(stride)), channels) for name, (stride, channels) in levels.items()}


def _levels(features: Mapping[str, tuple[int, int]], head: Mapping[str, tuple[int, int]]) -> Levels | None:
    """What each level of the head is made of; None where the features have just these.

    Raises:
        InputError: it has another number of channels.
    """
    found: dict[str, list[Any]] = {}
    for name, (stride, channels) in head.items():
        same = [other for other in features if features[other][0] == stride]
        rank = sum(head[other][0] == stride for other in found)
        distance = {other: math.log2(stride / features[other][0]) for other in features}
        nearest = min(features, key=lambda other: (abs(distance[other]), features[other][0]))
        source = same[min(rank, len(same) - 1)] if same else nearest
        if features[source][1] != channels:
            raise InputError(
                f"the head reads {channels} channels at stride {stride}, and the features have {features[source][1]} "
                f"at stride {features[source][0]}; give detectors whose pyramids are equally wide"
            )
        found[name] = [source, round(distance[source])]
    made = {name: octaves for name, (_, octaves) in found.items() if octaves}
    if made:
        strides = [head[name][0] for name in made]
        say_once(
            f"the features have no level of stride {', '.join(map(str, strides))}, which the head reads; the nearest "
            "of theirs stands in for it, thinned out or enlarged"
        )
    plain = {name: [name, 0] for name in features}
    return None if list(found.items()) == list(plain.items()) else found
