"""The archive of a search: append-only SQLite, one row per finished candidate."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jdkd.detect import DetectorSpec
from jdkd.errors import InputError
from jdkd.pool import Subnet

ARCHIVE = "archive.sqlite"
_TYPES = {"int": "INTEGER", "float": "REAL", "str": "TEXT"}


@dataclass(frozen=True)
class Cycle:
    """A stretch of training: ``steps`` steps from ``start`` of a learning-rate cycle of ``total`` steps."""

    steps: int
    start: int
    total: int
    lr: float


@dataclass(frozen=True)
class Candidate:
    """A detector that the search has trained, scored and timed.

    Args:
        number: counts from 0, the base.
        id: names the candidate and its architecture.
        parent: id of the candidate it inherits from; None for the base.
        kind: ``"base"``, ``"morph"`` (another student) or ``"teacher"`` (another teacher).
        action: what was done to the parent, in words.
        teacher: the pool subnet that taught it; None for the base.
        spec: its architecture.
        feature_channels: pool FPN channel opposite each of its own.
        map, map50: COCO scores on the selection split.
        latency_p50: milliseconds end to end, median.
        latency_ratio: latency over the base's, interleaved in one measurement, at the 20th percentiles.
        latency_samples: every timed call, in milliseconds.
        steps: training steps of its own.
        lineage_steps: those and its ancestors', the base's own training left out.
        cycles: the stretches of training of its lineage, oldest first.
        params, gmacs: size and cost at its input size.
        seconds: wall-clock time that it took.
    """

    number: int
    id: str
    parent: str | None
    kind: str
    action: str
    teacher: Subnet | None
    spec: DetectorSpec
    feature_channels: tuple[int, ...]
    map: float
    map50: float
    latency_p50: float
    latency_ratio: float
    latency_samples: tuple[float, ...]
    steps: int
    lineage_steps: int
    cycles: tuple[Cycle, ...]
    params: int
    gmacs: float
    seconds: float


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in mAP without being slower; fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.latency_ratio, -c.map)):
        if not front or candidate.map > front[-1].map:
            front.append(candidate)
    return front


class Archive:
    """Every finished candidate of a search, in the order they finished.

    Args:
        file: the database; created if it does not exist.

    Raises:
        InputError: the file is not such a database.
    """

    def __init__(self, file: Path) -> None:
        self._columns = [(field.name, _column_type(str(field.type))) for field in fields(Candidate)]
        columns = ", ".join(f"{name} {kind}" for name, kind in self._columns)
        columns = columns.replace("number INTEGER", "number INTEGER PRIMARY KEY")
        try:
            self._db = sqlite3.connect(file)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(f"CREATE TABLE IF NOT EXISTS candidates ({columns})")
            self.candidates = [_from_row(row) for row in self._rows()]
        except sqlite3.DatabaseError as error:
            self.close()
            raise InputError(f"{file} is no archive of a search ({error}); search into another folder.") from None

    def __len__(self) -> int:
        return len(self.candidates)

    def add(self, candidate: Candidate) -> None:
        """Appends a candidate; once this returns, it survives a crash."""
        row = _to_row(candidate)
        marks = ", ".join("?" * len(row))
        with self._db:
            self._db.execute(f"INSERT INTO candidates VALUES ({marks})", row)
        self.candidates.append(candidate)

    def lineage(self, candidate: Candidate) -> list[Candidate]:
        """The candidate and its ancestors, the base first."""
        by_id = {other.id: other for other in self.candidates}
        line = [candidate]
        while line[-1].parent is not None:
            line.append(by_id[line[-1].parent])
        return line[::-1]

    def close(self) -> None:
        self._db.close()

    def _rows(self) -> list[dict[str, Any]]:
        names = [name for name, _ in self._columns]
        found = self._db.execute(f"SELECT {', '.join(names)} FROM candidates ORDER BY number")
        return [dict(zip(names, row, strict=True)) for row in found]


def _column_type(annotation: str) -> str:
    for name, kind in _TYPES.items():
        if f"'{name}'" in annotation:
            return kind
    return "TEXT"


def _to_row(candidate: Candidate) -> list[Any]:
    values = {field.name: getattr(candidate, field.name) for field in fields(Candidate)}
    values["spec"] = candidate.spec.to_json(indent=None)
    values["teacher"] = candidate.teacher and json.dumps(candidate.teacher.to_json())
    values["cycles"] = json.dumps([asdict(cycle) for cycle in candidate.cycles])
    for name in ("feature_channels", "latency_samples"):
        values[name] = json.dumps(values[name])
    return list(values.values())


def _from_row(row: dict[str, Any]) -> Candidate:
    row["spec"] = DetectorSpec.from_json(row["spec"], source=f"candidate {row['number']}")
    row["teacher"] = row["teacher"] and Subnet.from_json(json.loads(row["teacher"]))
    row["cycles"] = tuple(Cycle(**cycle) for cycle in json.loads(row["cycles"]))
    for name in ("feature_channels", "latency_samples"):
        row[name] = tuple(json.loads(row[name]))
    return Candidate(**row)
