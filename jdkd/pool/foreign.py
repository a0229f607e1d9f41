"""Detectors of another make as teachers: which of them can teach the descendants of a pool's base."""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from jdkd.detect.architecture import architecture_of, unlike
from jdkd.distill import pyramids
from jdkd.distill.levels import POOLED, level_strides
from jdkd.errors import InputError, few
from jdkd.pool.members import BASE

NAMED = ("largest", "smallest", "best")  # what names a subnet


def require_name(name: str, taken: Collection[str]) -> None:
    """Refuses a name that could not be told from another, or is none of a folder.

    Raises:
        InputError: names it and the remedy.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
        raise InputError(f"a foreign teacher is named {name!r}; give it a name of letters, digits, '.', '-' and '_'.")
    if name in NAMED or re.fullmatch(r"\d+x[\d.]+", name):
        raise InputError(f"a foreign teacher is named {name}, as a subnet is; give it another name.")
    if name == BASE:
        raise InputError(f"a foreign teacher {name} is named as what the search starts from; give it another name.")
    if name in taken:
        raise InputError(f"the pool has a foreign teacher {name} already; give the other one another name.")


def require_common(name: str, detector: nn.Module, largest: nn.Module, images: Any) -> None:
    """Refuses a detector that cannot teach what the pool's own subnets teach.

    Args:
        name: of the foreign teacher.
        detector: it; of any family, backbone and pyramid.
        largest: the pool's supernet.
        images: a list with one training image ``[3, H, W]`` in 0..1.

    Raises:
        InputError: it has other classes or the same in another order, no feature maps, or none of a stride that the
            pool's have.
    """
    ours, theirs = (architecture_of(model, f"teacher {name}").classes for model in (largest, detector))
    if ours != theirs:
        order = " in another order" if sorted(ours) == sorted(theirs) else ""
        known = f"the classes {few(theirs)}" if theirs else "classes that have no names"
        raise InputError(
            f"teacher {name} knows {known} and the pool {few(ours)}{order}; give a detector of the pool's classes, "
            f"named so (`jdkd import --classes`): {unlike(theirs, ours)}."
        )
    try:
        strides = [_strides(model, images) for model in (largest, detector)]
    except InputError as error:
        raise InputError(f"teacher {name} has no features to teach by: {error}") from None
    if not strides[0] & strides[1]:
        raise InputError(
            f"teacher {name} has levels of stride {sorted(strides[1])} and the pool of stride {sorted(strides[0])}; "
            "give a detector that shares strides with the pool."
        )


def _strides(model: nn.Module, images: Any) -> set[int]:
    """The strides of the levels of a detector, without the pooled one, which says nothing of its own."""
    (seen,) = pyramids(model, [images])
    strides = level_strides(seen.pyramid, seen.size, "detector")
    return {stride for name, stride in strides.items() if name.rpartition(".")[2] != POOLED}
