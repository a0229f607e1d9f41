"""Reading the archive of a search."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jdkd.errors import InputError

_JSON = ("spec", "latency_samples", "cycles")


@dataclass(frozen=True)
class Candidate:
    """One row of the archive; scores are on the selection split.

    Args:
        number: order in which it was archived.
        id, parent: of the candidate and of the one it came from (None for the base).
        action: what was done to the parent, in words.
        teacher: name of the teacher that it was distilled from, or None.
        spec: the detector's spec as a dictionary.
        map, map50: COCO mAP at 0.50:0.95 and at 0.50, in 0..1.
        latency_p50: end to end, in ms.
        latency_ratio: to the base, measured in turn with it.
        latency_samples: raw ms.
        steps, lineage_steps: optimizer steps of this candidate, and together with all its ancestors after the
            base.
        cycles: [steps, peak learning rate] of each of the lineage's cycles.
        params, gmacs: size and arithmetic.
        kind: `base`, `morph` or `teacher`: which of the two was changed.
        seconds: wall time that the candidate took.
    """

    number: int
    id: str
    parent: str | None
    action: str
    teacher: str | None
    spec: dict[str, Any]
    map: float
    map50: float
    latency_p50: float
    latency_ratio: float
    latency_samples: list[float]
    steps: int
    lineage_steps: int
    cycles: list[list[float]]
    params: int
    gmacs: float
    kind: str
    seconds: float


def read_archive(file: Path) -> list[Candidate]:
    """Read every candidate of an archive, in the order in which they were archived.

    Args:
        file: `archive.sqlite` of a search; it is opened read-only.

    Returns:
        The candidates.

    Raises:
        InputError: there is no such file, or it is not an archive.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist; a report is made of the folder of `jdkd search`.")
    names = [field.name for field in fields(Candidate)]
    columns = ", ".join(f'"{name}"' for name in names)
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(f"SELECT {columns} FROM candidates ORDER BY number").fetchall()
        return [Candidate(**_decoded(dict(zip(names, row, strict=True)))) for row in rows]
    except (sqlite3.DatabaseError, ValueError) as error:
        raise InputError(f"{file} is not the archive of a search ({error}); run the search again.") from error


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto front of (mAP up, latency relative to the base down), fastest first.

    Args:
        candidates: any.

    Returns:
        Those that no other beats in one of the two and matches in the other; of equals the first archived.
    """
    best, kept = float("-inf"), []
    for candidate in sorted(candidates, key=lambda one: (one.latency_ratio, -one.map, one.number)):
        if candidate.map > best:
            kept.append(candidate)
            best = candidate.map
    return kept


def lineage(candidates: Sequence[Candidate], identity: str | None) -> list[Candidate]:
    """A candidate's ancestors and itself, the base first.

    Args:
        candidates: the archive.
        identity: id of the candidate; an unknown one has no lineage.

    Returns:
        From the base to the candidate.
    """
    known = {candidate.id: candidate for candidate in candidates}
    line: list[Candidate] = []
    while identity in known and known[identity] not in line:
        line.append(known[identity])
        identity = line[-1].parent
    return line[::-1]


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: json.loads(value) if name in _JSON else value for name, value in row.items()}
