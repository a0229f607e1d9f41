"""Which levels the Pearson loss compares: what callers pass, checked and brought into pairs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.ops.pearson_strides import pairs_of, strides_of
from jdkd.reference.pearson import Features

PAIRINGS = ("index", "stride")


def as_levels(features: Features, name: str) -> list[Tensor]:
    """The levels of a tensor, iterable or mapping, each ``[N, C, H, W]``.

    A mapping may hold lists and tuples of levels, and None, as a model's output with ``feature_maps`` does; of one that
    has ``feature_maps`` nothing else is taken.

    Raises:
        InputError: one is no dense floating ``[N, C, H, W]`` with elements.
    """
    if isinstance(features, Tensor):
        levels = [features]
    elif isinstance(features, Mapping):
        levels = [level for _, value in entries_with_levels(features) for level in _listed(value)]
    elif isinstance(features, Iterable):
        levels = list(features)
    else:
        raise InputError(f"{name} is a {type(features).__name__}; pass a tensor [N, C, H, W] or levels of them")
    for index, level in enumerate(levels):
        if not isinstance(level, Tensor):
            raise InputError(f"{name} level {index} is a {type(level).__name__}; pass tensors [N, C, H, W]")
        if level.dim() != 4 or level.numel() == 0 or not level.is_floating_point() or level.layout != torch.strided:
            raise InputError(
                f"{name} level {index} has shape {tuple(level.shape)}, dtype {level.dtype} and layout {level.layout}; "
                "it must be a dense floating [N, C, H, W] with elements"
            )
    return levels


def in_order_of(student: Features, teacher: Features) -> Features:
    """The teacher's levels in the order of the student's where both are mappings of the same names."""
    if isinstance(student, Mapping) and isinstance(teacher, Mapping) and student.keys() == teacher.keys():
        return {name: teacher[name] for name in student}
    return teacher


def rebuilt(features: Features, levels: Sequence[Tensor]) -> Features:
    """Levels in the form that others came in: a tensor, mapping, named tuple, tuple or list; else a list."""
    if isinstance(features, Tensor):
        return levels[0]
    if isinstance(features, Mapping):
        if (kind := type(features)) in (dict, OrderedDict):
            outer = kind(features)  # which a compiler can follow, and a copy not
        else:
            outer = copy.copy(features) if isinstance(features, MutableMapping) else dict(features)
        remaining = iter(levels)
        for name, value in entries_with_levels(features):
            inside = [next(remaining) for _ in _listed(value)]
            if inside:
                outer[name] = rebuilt(value, inside)
        return outer
    if isinstance(features, tuple):
        return features._make(levels) if hasattr(features, "_make") else tuple(levels)
    return list(levels)


FEATURE_MAPS = "feature_maps"  # Hugging Face's name for a backbone's levels, beside which it may give other tensors


def entries_with_levels(features: Mapping) -> list[tuple[str, object]]:
    """The entries of a mapping that hold levels."""
    if features.get(FEATURE_MAPS) is not None:
        return [(FEATURE_MAPS, features[FEATURE_MAPS])]
    return list(features.items())


def _listed(value: object) -> Sequence:
    """The levels in one entry of a mapping."""
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def paired(
    students: Sequence[Tensor], teachers: Sequence[Tensor], pairing: str, levels: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Which teacher level stands opposite which student level.

    Args:
        students, teachers: levels ``[N, C, H, W]``.
        pairing: ``"index"``, in the order given, or ``"stride"``: levels of the same stride, told by their
            sizes, since both networks saw the same images.
        levels: indices of the student levels wanted; None is all that pair up.

    Returns:
        Pairs of indices, in the order of ``levels``, else of the student's levels.

    Raises:
        InputError: nothing pairs up, ``levels`` asks for what is not there, or a pair differs in images, channels
            or device.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"pairing is {pairing!r}; choose one of {', '.join(PAIRINGS)}")
    if pairing == "index" and len(students) != len(teachers):
        raise InputError(
            f"student has {len(students)} levels and teacher has {len(teachers)}; pass the levels that pair up, "
            'or pairing="stride"'
        )
    if not students or not teachers:
        raise InputError("student and teacher have no levels; pass at least one feature [N, C, H, W]")
    opposite = dict(enumerate(range(len(students)))) if pairing == "index" else _by_stride(students, teachers)
    if not opposite:
        raise InputError(
            f"no level of the student, of sizes {_sizes(students)}, has the stride of one of the teacher, of sizes "
            f"{_sizes(teachers)}; run both on images of one size and pass levels that have strides in common"
        )
    if pairing == "stride" and levels is None:
        _say_what_is_left_out(students, teachers, opposite)
    if levels is not None:
        if not levels or not set(levels) <= set(opposite) or len(set(levels)) < len(levels):
            raise InputError(
                f"levels is {list(levels)}; name some of the student's levels {sorted(opposite)}, which have a "
                "partner, once each"
            )
        opposite = {index: opposite[index] for index in levels}
    pairs = list(opposite.items())
    for index, other in pairs:
        _check_pair(index, students[index], teachers[other])
        if students[index].device != students[pairs[0][0]].device:
            raise InputError(
                f"level {index} is on {students[index].device} and level {pairs[0][0]} on "
                f"{students[pairs[0][0]].device}; move all levels to one device"
            )
    return pairs


def _by_stride(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> dict[int, int]:
    """For every student level with a partner, the teacher level of its stride, relative to the finest of all."""
    sizes = [tuple(level.shape[2:]) for level in (*students, *teachers)]
    finest = max(sizes, key=lambda size: size[0] * size[1])
    ours = strides_of(sizes[: len(students)], finest, "student")
    theirs = strides_of(sizes[len(students) :], finest, "teacher")
    return dict(pairs_of(ours, theirs))


def _say_what_is_left_out(students: Sequence[Tensor], teachers: Sequence[Tensor], opposite: Mapping[int, int]) -> None:
    if torch.compiler.is_compiling():
        return
    for who, levels, paired_up in (("student", students, opposite.keys()), ("teacher", teachers, opposite.values())):
        alone = [level for index, level in enumerate(levels) if index not in paired_up]
        if alone:
            say_once(
                f"pairing='stride' leaves out the {who}'s levels of sizes {_sizes(alone)}: the other has none of their "
                "stride",
                key=f"pairing by stride, {who}, {len(levels)} levels, {len(alone)} left out",
            )


def _sizes(levels: Sequence[Tensor]) -> str:
    return ", ".join(f"{level.shape[2]}x{level.shape[3]}" for level in levels)


def _check_pair(index: int, student: Tensor, teacher: Tensor) -> None:
    for what, axis, remedy in (
        ("images", 0, "run both networks on the same batch"),
        ("channels", 1, "select or project channels first"),
    ):
        if student.shape[axis] != teacher.shape[axis]:
            raise InputError(
                f"level {index}: student has {student.shape[axis]} {what} and teacher has "
                f"{teacher.shape[axis]}; {remedy}"
            )
    if student.device != teacher.device:
        raise InputError(
            f"level {index}: student is on {student.device} and teacher on {teacher.device}; "
            "move one to the other's device"
        )
