"""How the single pass of the Pearson loss is laid over a chip: names for what the planner of ``jdkd._C`` answers.

The terms are those of ``csrc/ops/pearson_plan.h``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

Shape = tuple[int, int, int]  # N, C, H W
Chip = tuple[int, int, int, int]  # SMs, shared memory per block and per SM in bytes, blocks of the largest cluster


class Level(NamedTuple):
    """The part of a launch that is one level's."""

    launch: int | None  # None: a channel does not fit on the chip
    ranks: int
    teams: int
    chunk: int
    room: int
    first_cluster: int
    clusters: int


class Launch(NamedTuple):
    """One launch, and its levels in the order of their clusters."""

    cluster: int
    warps: int
    blocks_per_sm: int
    shared_bytes: int
    clusters: int
    levels: tuple[int, ...]


class Row(NamedTuple):
    """What a team of a block holds of one plane."""

    channel: int
    start: int
    length: int
    phase: int
    offset: int
    vectors: int
    bulk: int
    all_vectors: int  # of all rows of the team


class Plan(NamedTuple):
    """All levels, in the order they were given, and the launches that run them."""

    levels: list[Level]
    launches: list[Launch]

    @property
    def fits(self) -> bool:
        """Whether every level fits on the chip."""
        return all(level.launch is not None for level in self.levels)


def plan(shapes: Sequence[Shape], itemsize: int, chip: Chip) -> Plan:
    """Lays levels over a chip; needs ``jdkd._C``.

    Args:
        shapes: of the levels.
        itemsize: bytes of an element, 2 or 4.
        chip: what it offers.

    Raises:
        ValueError: a size is not positive, ``itemsize`` is another one, or the largest cluster is no power of two.
    """
    flat = [size for shape in shapes for size in shape]
    of_levels, of_launches = torch.ops.jdkd_C.pearson_plan(flat, itemsize, chip)
    levels = [Level(None if launch < 0 else launch, *rest) for launch, *rest in _cut(of_levels, len(Level._fields))]
    launches = []
    for index, launch in enumerate(_cut(of_launches, len(Launch._fields) - 1)):
        members = (number for number, level in enumerate(levels) if level.launch == index)
        launches.append(Launch(*launch, tuple(sorted(members, key=lambda number: levels[number].first_cluster))))
    return Plan(levels, launches)


def rows(shape: Shape, level: Level, launch: Launch, vector: int, cluster: int, rank: int, team: int) -> list[Row]:
    """What a team holds of a level; needs ``jdkd._C``. For tests.

    Args:
        shape: of the level.
        level: of its plan.
        launch: that runs it.
        vector: elements of a vector: 8, 4, or 1 where the tensors are not aligned.
        cluster: of the level's clusters.
        rank: block of the cluster.
        team: of the block.

    Returns:
        One row a plane, in elements and vectors.
    """
    place = (cluster, rank, launch.cluster, team)
    flat = torch.ops.jdkd_C.pearson_plan_rows(shape, (level.ranks, level.teams, level.chunk, level.room), vector, place)
    return [Row(*row) for row in _cut(flat, len(Row._fields))]


def _cut(flat: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    return (flat[begin : begin + width] for begin in range(0, len(flat), width))
