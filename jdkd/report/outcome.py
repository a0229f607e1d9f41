"""What a finished search left behind, read back."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.search.archive import ARCHIVE, Archive, Candidate
from jdkd.search.choice import pareto_front
from jdkd.search.outcome import RESULT, read_result

NAMES = {
    "base": "base",
    "control": "control, same cycles",
    "control_single": "control, one cycle",
    "student": "student",
}


@dataclass(frozen=True)
class Outcome:
    """A finished search.

    Args:
        result: contents of `result.json`; its scores are on the images that report.
        candidates: the archive, in order; their scores are on the images that select.
        front: those of them that no other beats, fastest first.
        line: the student and its ancestors, the base first.
    """

    result: dict[str, Any]
    candidates: list[Candidate]
    front: list[Candidate]
    line: list[Candidate]


def read_outcome(folder: Path) -> Outcome:
    """Read what a search wrote.

    Args:
        folder: with `result.json` and `archive.sqlite`.

    Returns:
        The outcome.

    Raises:
        InputError: one of the two is missing or unreadable.
    """
    for name in (ARCHIVE, RESULT):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} does not exist; a report is made of the folder of a finished search.")
    result = read_result(folder)
    with closing(Archive(folder / ARCHIVE)) as archive:
        named = [candidate for candidate in archive.candidates if candidate.id == result.get("student_id")]
        line = archive.lineage(named[0]) if named else []
        return Outcome(result, archive.candidates, pareto_front(archive.scored), line)


@dataclass(frozen=True)
class Row:
    """Final scores of one network on the images that report; None where it was not measured, or failed.

    Args:
        key: its name in `result.json`.
        title: what it is, in words.
        map, map50: in 0..1.
        p50, p90, p99: end-to-end latency in ms.
        ratio, interval: of the architecture's median latency to the base's, with its 95 % interval.
        params, gmacs: size and arithmetic.
        train_steps: optimizer steps.
    """

    key: str
    title: str
    map: float | None
    map50: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    params: int | None
    gmacs: float | None
    train_steps: int | None

    def cells(self) -> list[str]:
        """The row as text, in the order of :data:`HEADINGS`."""
        ratio = _number(self.ratio, ".3f")
        if self.interval and self.interval[0] < self.interval[1]:  # the base's ratio to itself has no width
            ratio += f" ({self.interval[0]:.3f}–{self.interval[1]:.3f})"
        milliseconds = " / ".join(_number(value, ".1f") for value in (self.p50, self.p90, self.p99))
        size = _number(None if self.params is None else self.params / 1e6, ".2f")
        scores = [_number(self.map, ".3f"), _number(self.map50, ".3f")]
        return [
            self.title,
            *scores,
            milliseconds,
            ratio,
            size,
            _number(self.gmacs, ".2f"),
            _number(self.train_steps, ",d"),
        ]


HEADINGS = (
    "network",
    "mAP",
    "mAP50",
    "p50 / p90 / p99, ms",
    "ratio (95 %)",
    "M params",
    "GMACs",
    "steps",
)


def rows(result: dict[str, Any]) -> list[Row]:
    """Base, controls and student of a result, as far as it has them.

    Args:
        result: contents of `result.json`.

    Returns:
        One row each, the base first.
    """
    made = []
    for key, title in NAMES.items():
        entry = result.get(key)
        if not isinstance(entry, dict):
            continue
        latency, interval = entry.get("latency_ms") or {}, entry.get("latency_ratio_interval")
        made.append(
            Row(
                key=key,
                title=title,
                ratio=entry.get("latency_ratio"),
                interval=tuple(interval) if interval else None,
                **{name: latency.get(name) for name in ("p50", "p90", "p99")},
                **{name: entry.get(name) for name in ("map", "map50", "params", "gmacs", "train_steps")},
            )
        )
    return made


def verdict(result: dict[str, Any]) -> str:
    """Whether the asked latency was met, as a sentence; empty where the result does not say."""
    target, student = result.get("target_latency"), result.get("student") or {}
    if target is None or student.get("latency_ratio") is None:
        return ""
    taken = f"The student takes {_told(student['latency_ratio'], target)} of the base's time"
    if result.get("target_met"):
        return f"{taken}; {target} was asked for."
    return f"{taken} and misses the {target} that was asked for; it is the fastest found."


def _told(ratio: float, target: float) -> str:
    """A ratio in so many digits that it is seen on which side of the target it is."""
    digits = next(n for n in range(3, 20) if (float(f"{ratio:.{n}f}") <= target) == (ratio <= target))
    return f"{ratio:.{digits}f}"


def images_of(result: dict[str, Any], role: str) -> str:
    """Which images selected or reported, as a phrase; empty where the result does not say.

    Args:
        result: contents of `result.json`.
        role: `selection` or `report`.
    """
    part = result.get(role)
    if not isinstance(part, dict):
        return ""
    return (
        f"{part['images']:,} images with {part['boxes']:,} boxes of {part['annotations']} in {part['image_folder']} "
        f"({part['which']})"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
