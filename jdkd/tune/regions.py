"""What there is to time on a device: the regions of all tables in which several candidates can run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from jdkd.tune import convolutions, pearson, weights
from jdkd.tune.shapes import Shape

TABLES: tuple[Callable[[torch.device, bool], Iterator[Shape]], ...] = (
    pearson.backends,
    convolutions.kernels,
    weights.backends,
    pearson.single_pass,
    convolutions.levels,
)


class Job(NamedTuple):
    """A region of a table.

    Args:
        table: its name.
        region: likewise.
        default: the candidate that runs without a measurement.
        others: candidates that were seen right here, or are plain torch.
        shapes: of the region; a candidate is to win in all of them.
    """

    table: str
    region: str
    default: str
    others: tuple[str, ...]
    shapes: tuple[Shape, ...]


def plan(device: torch.device, quick: bool = False) -> list[Job]:
    """The regions to time on a device, those of the tables in turn, after a check of all kernels in them.

    Args:
        device: a CPU or a GPU.
        quick: only in the dtype that is trained in most.
    """
    by_table = [list(_regions(shapes(device, quick))) for shapes in TABLES]
    return [job for turn in itertools.zip_longest(*by_table) for job in turn if job is not None]


def _regions(shapes: Iterator[Shape]) -> Iterator[Job]:
    """The regions of shapes in which there is something to choose."""
    found: dict[str, list[Shape]] = {}
    for shape in shapes:
        if (region := shape.table.region(shape.call)) is not None:
            found.setdefault(region, []).append(shape)
    for region, own in found.items():
        default, others = _candidates(own)
        if default and others:
            yield Job(own[0].table.name, region, default, others, tuple(own))


def _candidates(shapes: Sequence[Shape]) -> tuple[str | None, tuple[str, ...]]:
    """What runs by default, and what else can, in all of some shapes; None where shapes differ in their default."""
    defaults, able = set(), []
    for shape in shapes:
        row, _ = shape.table._replace(region=_nowhere).choose(shape.call)
        defaults.add(None if row is None else row.name)
        able.append({row.name for row in shape.table.candidates if row.why_not(shape.call, is_tuned=True) is None})
    (default, *more) = defaults
    others = set.intersection(*able) - defaults
    names = (row.name for row in shapes[0].table.candidates if row.name in others)
    return (None, ()) if more else (default, tuple(names))


def _nowhere(call: object) -> None:
    return None
