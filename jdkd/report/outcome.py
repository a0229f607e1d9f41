"""What a search has written, read for those who show it."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.files import read_as
from jdkd.pool import ScoredTeacher
from jdkd.run_folder import RunFolder
from jdkd.search.archive import ARCHIVE, Archive, Candidate
from jdkd.search.choice import pareto_front
from jdkd.search.outcome import read_result
from jdkd.search.teachers import TEACHERS

KINDS = {"morph": "student changed", "teacher": "teacher changed", "train": "trained on"}
"""What is new about a candidate, in words; see :class:`jdkd.search.Proposal`."""


@dataclass(frozen=True)
class Student:
    """What a search found for one target.

    Args:
        entry: its scores on the images that report, as in `result.json`.
        folder: where its weights lie.
    """

    entry: dict[str, Any]
    folder: Path

    @property
    def target(self) -> float:
        """The latency that was asked for, over the base's."""
        return self.entry["target"]

    @property
    def met(self) -> bool:
        """Whether it is as fast, and as good, as was asked for."""
        return self.entry["target_met"]

    @property
    def candidate(self) -> str:
        """Its id in the archive."""
        return self.entry["id"]

    @property
    def title(self) -> str:
        return f"student for {self.target:g}"


@dataclass(frozen=True)
class Outcome:
    """A search, finished or under way.

    Args:
        folder: where it lies.
        result: contents of `result.json`, whose scores are on the images that report; empty while it runs.
        candidates: the archive, in order; their scores are on the images that select.
        teachers: the members of the pool that were scored, as in `teachers.json`.
        run: contents of `run.json`; empty where there is none.
    """

    folder: Path
    result: dict[str, Any]
    candidates: list[Candidate]
    teachers: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def scored(self) -> list[Candidate]:
        """Those that were trained, scored and timed."""
        return [one for one in self.candidates if one.failure is None]

    @property
    def front(self) -> list[Candidate]:
        """Those of them that no other beats, fastest first."""
        return pareto_front(self.scored)

    @cached_property
    def by_id(self) -> dict[str, Candidate]:
        return {one.id: one for one in self.candidates}

    @cached_property
    def students(self) -> list[Student]:
        return students_of(self.result, self.folder)

    @property
    def targets(self) -> list[float]:
        """The latencies that were asked for, over the base's, the slowest first."""
        told = [student.target for student in self.students]
        return sorted(told or self.run.get("identity", {}).get("targets", []), reverse=True)

    @property
    def chosen(self) -> dict[str, str]:
        """What the candidates that became students are called, by their ids; one may be the student of two targets."""
        targets: dict[str, list[str]] = {}
        for student in self.students:
            if student.candidate in self.by_id:
                targets.setdefault(student.candidate, []).append(f"{student.target:g}")
        return {id_: f"student for {' and '.join(asked)}" for id_, asked in targets.items()}

    @property
    def lines(self) -> list[list[Candidate]]:
        """Per candidate that became a student, it and its ancestors, the base first."""
        return [self.line(self.by_id[id_]) for id_ in self.chosen]

    def line(self, candidate: Candidate) -> list[Candidate]:
        """A candidate and its ancestors, the base first."""
        line = [candidate]
        while line[-1].parent is not None and line[-1].parent in self.by_id:
            line.append(self.by_id[line[-1].parent])
        return line[::-1]


def read_outcome(folder: Path | str) -> Outcome:
    """Read what a search has written so far.

    Args:
        folder: of a search; it holds `archive.sqlite`, and `result.json` once the search is finished.

    Returns:
        The outcome.

    Raises:
        InputError: there is no archive, it is empty, or one of the files is unreadable.
    """
    folder = Path(folder)
    file = folder / ARCHIVE
    if not file.is_file() or not file.stat().st_size:
        raise InputError(f"{file} does not exist or is empty; a report is made of the folder of a search.")
    result = read_result(folder) or {}
    with closing(Archive(file)) as archive:
        candidates = archive.candidates
    if not candidates:
        raise InputError(f"{file} holds no candidate yet; wait until the search has scored its base.")
    teachers = folder / TEACHERS
    remedy = "remove it and resume the search"
    members = read_as(_members, teachers, remedy) if teachers.is_file() else []
    return Outcome(folder, result, candidates, members, RunFolder(folder).read() or {})


def _members(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pool's members as a search has written them; raises where they are something else."""
    for member in content:
        ScoredTeacher.from_json(member)
    return content


def students_of(result: dict[str, Any], folder: Path = Path()) -> list[Student]:
    """The students of a result, in its order; none while a search runs.

    Args:
        result: contents of `result.json`.
        folder: of the search.
    """
    return [Student(entry, folder / entry["folder"]) for entry in result.get("students", [])]


def gains(candidate: Candidate, parent: Candidate | None) -> tuple[float, float]:
    """What an action changed in mAP and in the latency ratio; NaN where there is no parent or one of them failed."""
    if parent is None:
        return math.nan, math.nan
    return candidate.map - parent.map, candidate.latency_ratio - parent.latency_ratio


def signed(value: float) -> str:
    """A change with its sign, three digits."""
    told = f"{value:+.3f}"
    return told[1:] if told.strip("+-0.") == "" else told.replace("-", "−")
