"""What can be wrong with a data set, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jdkd.errors import InputError
from jdkd.notices import say_once

Severity = Literal["error", "repair", "warning"]

EXAMPLES = 3


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set, in every case where it is.

    Attributes:
        kind: what it is, in a few words; reads on after a count: "boxes without area".
        file: the annotation file or images folder it is found in.
        places: where it is found; what a place is knows ``describe``.
        describe: one case in words, given its place.
        remedy: what to do about it, or for a repair what is done about it.
        severity: an "error" makes the data set unusable; a "repair" is made on reading; of a "warning" the user
            should know.
        total: of how many this is found in some.
    """

    kind: str
    file: Path
    places: Sequence[int]
    describe: Callable[[int], str]
    remedy: str
    severity: Severity = "error"
    total: int = 0

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def cases(self) -> Iterator[str]:
        """Every case in words."""
        return (self.describe(place) for place in self.places)

    @property
    def sentence(self) -> str:
        """File, first case or cases, how many there are, and the remedy."""
        if self.severity == "error":
            more = f" (and {self.count - 1:,} more with {self.kind})" if self.count > 1 else ""
            return f"{self.file}: {self.describe(self.places[0])}{more}; {self.remedy}"
        of = f" of {self.total:,}" if self.total else ""
        shown = "; ".join(map(self.describe, self.places[:EXAMPLES]))
        rest = ", for example" if self.count > EXAMPLES else ""
        return f"{self.file}: {self.count:,}{of} {self.kind}, {self.remedy}{rest}: {shown}"


def remembered(problem: Problem) -> dict[str, Any]:
    """What of a problem an index keeps, JSON-able: all but its file, and of its cases the first."""
    kept = {name: getattr(problem, name) for name in ("kind", "remedy", "severity", "total", "count")}
    return {**kept, "examples": list(map(problem.describe, problem.places[:EXAMPLES]))}


def recalled(file: Path, kept: dict[str, Any]) -> Problem:
    """The problem again, in a file of the same content."""
    places, examples = range(kept["count"]), kept["examples"]
    settings = {name: kept[name] for name in ("kind", "remedy", "severity", "total")}
    return Problem(file=file, places=places, describe=lambda place: examples[place], **settings)


def refuse(problems: Sequence[Problem], strict: bool = False) -> None:
    """Raises for the first error; where there is none, says repairs and warnings once.

    Args:
        problems: what was found.
        strict: take repairs and warnings for errors.

    Raises:
        InputError: there is an error.
    """
    errors = [problem for problem in problems if strict or problem.severity == "error"]
    if not errors:
        for problem in problems:
            say_once(problem.sentence, key=f"{problem.kind} {problem.file.absolute()}")
        return
    first, others = errors[0], sum(problem.count for problem in errors[1:])
    sentence = first.sentence
    if first.severity != "error":
        sentence += "; --strict refuses that: correct the file, or leave --strict out"
    if others or first.count > 1:
        among = f", {others:,} of other kinds among them" if others else ""
        sentence += f" (`jdkd data check` lists all {first.count + others:,} problems{among})"
    raise InputError(sentence)
