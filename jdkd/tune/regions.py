"""What there is to choose on a device: the regions of all tables, and the candidates that can run in each."""

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
        others: candidates that can run and were seen right here, or are plain torch; where there is none, nothing is
            timed.
        shapes: of the region; a candidate is to win in all of them.
    """

    table: str
    region: str
    default: str
    others: tuple[str, ...]
    shapes: tuple[Shape, ...]


class Alone(NamedTuple):
    """What one candidate alone can compute on a device, so that there is nothing to time.

    Args:
        table: its name.
        candidate: likewise.
        beginnings: of the names of these regions, which no other region of the table has; none where it has no other.
    """

    table: str
    candidate: str
    beginnings: tuple[str, ...]

    def __str__(self) -> str:
        where = f" for {'; '.join(self.beginnings)}" if self.beginnings else ""
        return f"{self.table}: {self.candidate} alone{where}"


def plan(device: torch.device, quick: bool = False) -> list[Job]:
    """The regions of all tables on a device, those of the tables in turn, after a check of all kernels in them.

    Args:
        device: a CPU or a GPU.
        quick: only in the dtype that is trained in most, and no lists of channels.
    """
    by_table = [list(_regions(shapes(device, quick))) for shapes in TABLES]
    return [job for turn in itertools.zip_longest(*by_table) for job in turn if job is not None]


def alone(jobs: Sequence[Job]) -> list[Alone]:
    """What of every table one candidate alone can compute."""
    found: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        if not job.others:
            found.setdefault((job.table, job.default), []).append(job.region)
    others = {
        key: [job.region for job in jobs if job.table == key[0] and job.region not in regions]
        for key, regions in found.items()
    }
    return [Alone(*key, _beginnings(regions, others[key])) for key, regions in found.items()]


def _beginnings(regions: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The shortest beginnings of regions, in whole phrases between commas, that none of the others has."""
    found = {}
    for region in regions if others else ():
        starts = itertools.accumulate(region.split(", "), "{}, {}".format)
        found[next((start for start in starts if not any(_begins(other, start) for other in others)), region)] = None
    return tuple(found)


def _begins(region: str, start: str) -> bool:
    return f"{region}, ".startswith(f"{start}, ")


def _regions(shapes: Iterator[Shape]) -> Iterator[Job]:
    """The regions of shapes, with what can run in them."""
    found: dict[str, list[Shape]] = {}
    for shape in shapes:
        if (region := shape.table.region(shape.call)) is not None:
            found.setdefault(region, []).append(shape)
    for region, own in found.items():
        default, others = _candidates(own)
        if default:
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
