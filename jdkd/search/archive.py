"""The archive of a search in SQLite: one row per finished candidate, one per measurement of its latency."""

import json
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.pool.members import Teacher, teacher_from_json, teacher_to_json
from jdkd.rewrite import Architecture
from jdkd.search.proposal import Cycle
from jdkd.search.timing import PooledLatency, Timing, pooled

ARCHIVE = "archive.sqlite"
FORMAT = 4  # 1 kept one latency a candidate, without the base's samples; 2 a spec of one family; 3 no generations
_TYPES = {"int": "INTEGER", "float": "REAL", "str": "TEXT"}
_FOREIGN = ("SQLITE_ERROR", "SQLITE_NOTADB", "SQLITE_CORRUPT")  # what SQLite says of a file that is something else
_JSON = ("latency_interval", "seconds", "target")
_UNTIMED: dict[str, Any] = {
    **dict.fromkeys(("latency_p50", "base_latency_p50", "latency_ratio"), math.nan),
    "latency_interval": (math.nan, math.nan),
}


class ForeignFormat(InputError):
    """An archive of another version."""


@dataclass(frozen=True)
class Candidate:
    """A detector that the search has trained, scored and timed, or tried to.

    Args:
        number: counts from 0, the base.
        id: names the candidate and its architecture.
        parent: id of the candidate it inherits from; None for the base.
        generation: that it was made in; 0 for the base.
        kind: ``"base"``, or as of :class:`jdkd.search.proposal.Proposal`.
        action: what was done to the parent, in words.
        teacher: who taught it; None where nobody did.
        target: the latency ratio that it is made for; None where it explored for several.
        architecture: what it is made of.
        architecture_id: of that; what ``timings`` in the archive are kept under.
        map, map50: COCO scores on the images that select.
        steps: training steps of its own.
        lineage_steps: those and its ancestors', the base's own training left out.
        cycles: the stretches of training of its lineage, oldest first.
        params, gmacs: size and cost at its input size.
        seconds: of wall-clock time, by what they were spent on.
        latency_p50: milliseconds end to end, median.
        base_latency_p50: the base's, timed in turn with it.
        latency_ratio: the first over the second. These and the interval are of the architecture, pooled over all its
            measurements (:func:`jdkd.search.timing.pooled`), so equal ones have equal ratios.
        latency_interval: of the ratio, 95 %.
        predicted: the ratio that was predicted before it was measured.
        failure: why it could not be trained or scored; scores and latency are NaN then. None where all went well.
    """

    number: int
    id: str
    parent: str | None
    generation: int
    kind: str
    action: str
    teacher: Teacher | None
    target: float | None
    architecture: Architecture
    architecture_id: str
    map: float
    map50: float
    steps: int
    lineage_steps: int
    cycles: tuple[Cycle, ...]
    params: int
    gmacs: float
    seconds: Mapping[str, float]
    latency_p50: float
    base_latency_p50: float
    latency_ratio: float
    latency_interval: tuple[float, float]
    predicted: float = 1.0
    failure: str | None = None

    @property
    def annealed(self) -> bool:
        """Whether it was trained to the end of a learning-rate cycle."""
        return bool(self.cycles) and self.cycles[-1].start + self.cycles[-1].steps == self.cycles[-1].total


class Archive:
    """Every finished candidate of a search, in the order they finished, and every measurement of their latency.

    Nothing is ever taken out. What a candidate's row says of latency follows from the rows of ``timings`` and is
    brought up to date with each.

    Args:
        file: the database; created if it does not exist.

    Raises:
        InputError: the file is not such a database, one of another version, or cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        self._columns = [(field.name, _column_type(str(field.type))) for field in fields(Candidate)]
        self._db = sqlite3.connect(":memory:")
        try:
            self._db = sqlite3.connect(file)
            self._db.execute("PRAGMA synchronous = FULL")
            self._require_tables(file)
            self.candidates = [_from_row(row) for row in self._rows()]
            self._require_whole()
        except sqlite3.DatabaseError as error:
            self.close()
            if getattr(error, "sqlite_errorname", "") in _FOREIGN:
                raise InputError(f"{file} is no archive of a search ({error}); search into another folder.") from None
            raise InputError(
                f"{file} cannot be opened ({error}): end the process that holds it, or make it and its folder "
                "writable, then resume."
            ) from error
        except ForeignFormat:
            self.close()
            raise
        except (InputError, KeyError, TypeError, ValueError) as error:
            self.close()
            raise InputError(
                f"{file} holds a row that cannot be read ({str(error).rstrip('.')}); search into another folder."
            ) from None

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def scored(self) -> list[Candidate]:
        """Those that were trained, scored and timed: all but the failed."""
        return [candidate for candidate in self.candidates if candidate.failure is None]

    def add(self, timing: Timing | None, **known: Any) -> Candidate:
        """Appends a candidate with a measurement of its latency; once this returns, both survive a crash.

        Args:
            timing: of the candidate's architecture; None for one that failed.
            known: every field of the candidate but those of its latency.
        """
        candidate = Candidate(**known, **_UNTIMED)
        row = _to_row(candidate)
        with self._db:
            self._db.execute(f"INSERT INTO candidates VALUES ({', '.join('?' * len(row))})", row)
            latency = timing and self._insert(timing)
        self.candidates.append(candidate)
        if timing and latency:
            self._show(timing.architecture_id, latency)
        return self.candidates[-1]

    def add_timing(self, timing: Timing) -> PooledLatency:
        """Appends a measurement and brings every candidate of that architecture up to date."""
        with self._db:
            latency = self._insert(timing)
        self._show(timing.architecture_id, latency)
        return latency

    def timings(self, architecture_id: str) -> list[Timing]:
        """All measurements of an architecture, the latest last."""
        found = self._db.execute(
            "SELECT architecture_id, stage, environment, samples, base_samples FROM timings WHERE architecture_id = ? "
            "ORDER BY number",
            (architecture_id,),
        )
        return [Timing(name, stage, *map(json.loads, rest)) for name, stage, *rest in found]

    def was_timed(self, architecture_id: str, stage: str, machine: str) -> bool:
        """Whether an architecture has a measurement of a stage on a machine."""
        return any((timing.stage, timing.machine) == (stage, machine) for timing in self.timings(architecture_id))

    def latency(self, architecture_id: str) -> PooledLatency:
        """What is known of an architecture's latency on the machine that it was last timed on."""
        timings = self.timings(architecture_id)
        return pooled([timing for timing in timings if timing.machine == timings[-1].machine])

    def close(self) -> None:
        self._db.close()

    def _insert(self, timing: Timing) -> PooledLatency:
        """Writes a measurement, and what follows from it, inside the caller's transaction."""
        written = [json.dumps(value) for value in (timing.environment, timing.samples, timing.base_samples)]
        row = (timing.architecture_id, timing.stage, timing.machine, *written)
        self._db.execute(f"INSERT INTO timings VALUES (NULL, {', '.join('?' * len(row))})", row)
        latency = self.latency(timing.architecture_id)
        shown = _shown(latency)
        values = (*list(shown.values())[:-1], json.dumps(shown["latency_interval"]), timing.architecture_id)
        places = " = ?, ".join(shown)
        self._db.execute(f"UPDATE candidates SET {places} = ? WHERE architecture_id = ? AND failure IS NULL", values)
        return latency

    def _show(self, architecture_id: str, latency: PooledLatency) -> None:
        self.candidates = [
            replace(one, **_shown(latency)) if one.architecture_id == architecture_id and one.failure is None else one
            for one in self.candidates
        ]

    def _require_tables(self, file: Path) -> None:
        """Lays out a new file; refuses one of another version; leaves any other alone."""
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if tables and found != FORMAT:
            raise ForeignFormat(
                f"{file} was written by another version of jdkd (format {found or 1}, here {FORMAT}), whose "
                "columns mean something else; search into another folder, or read it with the jdkd that wrote it."
            )
        if not tables:
            columns = ", ".join(f"{name} {kind}" for name, kind in self._columns)
            columns = columns.replace("number INTEGER", "number INTEGER PRIMARY KEY")
            texts = ("architecture_id", "stage", "machine", "environment", "samples", "base_samples")
            timings = ", ".join(f"{name} TEXT" for name in texts)
            with self._db:
                self._db.execute("BEGIN")
                self._db.execute(f"CREATE TABLE candidates ({columns})")
                self._db.execute(f"CREATE TABLE timings (number INTEGER PRIMARY KEY, {timings})")
                self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def _require_whole(self) -> None:
        """Refuses an archive that lacks what a search never leaves out.

        Raises:
            ValueError: a candidate, its parent or its timings are missing.
        """
        known: set[str | None] = {None}
        for number, one in enumerate(self.candidates):
            if one.number != number or one.parent not in known:
                raise ValueError(f"what candidate {one.number} follows or descends from is missing")
            known.add(one.id)
        for name in {one.architecture_id for one in self.scored}:
            timings = self.timings(name)
            if not timings or not all(timing.samples and timing.base_samples for timing in timings):
                raise ValueError(f"timings of architecture {name} are missing")

    def _rows(self) -> list[dict[str, Any]]:
        names = [name for name, _ in self._columns]
        found = self._db.execute(f"SELECT {', '.join(names)} FROM candidates ORDER BY number")
        return [dict(zip(names, row, strict=True)) for row in found]


def _shown(latency: PooledLatency) -> dict[str, Any]:
    """What a candidate's row says of its architecture's latency."""
    ratio = latency.ratio
    medians = {"latency_p50": latency.own.p50, "base_latency_p50": latency.base.p50}
    return {**medians, "latency_ratio": ratio.value, "latency_interval": ratio.interval}


def _column_type(annotation: str) -> str:
    for name, kind in _TYPES.items():
        if f"'{name}'" in annotation:
            return kind
    return "TEXT"


def _to_row(candidate: Candidate) -> list[Any]:
    values = {field.name: getattr(candidate, field.name) for field in fields(Candidate)}
    values["architecture"] = candidate.architecture.to_json(indent=None)
    values["teacher"] = candidate.teacher and json.dumps(teacher_to_json(candidate.teacher))
    values["cycles"] = json.dumps([asdict(cycle) for cycle in candidate.cycles])
    for name in _JSON:
        values[name] = json.dumps(values[name])
    return list(values.values())


def _from_row(row: dict[str, Any]) -> Candidate:
    row["architecture"] = Architecture.from_json(row["architecture"], source=f"candidate {row['number']}")
    row["teacher"] = row["teacher"] and teacher_from_json(json.loads(row["teacher"]))
    row["cycles"] = tuple(Cycle(**cycle) for cycle in json.loads(row["cycles"]))
    for name in _JSON:
        row[name] = json.loads(row[name])
    row["latency_interval"] = tuple(row["latency_interval"])
    for field in fields(Candidate):
        if row[field.name] is None and field.type is float:  # SQLite keeps NaN as NULL
            row[field.name] = math.nan
    return Candidate(**row)
