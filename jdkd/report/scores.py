"""The final scores of a search's networks, as rows of a table: see :func:`rows`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jdkd.report.outcome import students_of


@dataclass(frozen=True)
class Row:
    """Final scores of one network on the images that report; None where it was not measured, or failed.

    Args:
        key: `base`, `control` or `student`.
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
    """Base, control and students of a result, as far as it has them.

    Args:
        result: contents of `result.json`.

    Returns:
        One row each, the base first.
    """
    students = students_of(result)
    found = [(name, name, result.get(name)) for name in ("base", "control")]
    found += [("student", one.title if len(students) > 1 else "student", one.entry) for one in students]
    return [_row(key, title, entry) for key, title, entry in found if entry is not None]


def _row(key: str, title: str, entry: dict[str, Any]) -> Row:
    latency, interval = entry.get("latency_ms") or {}, entry.get("latency_ratio_interval")
    return Row(
        key=key,
        title=title,
        ratio=entry.get("latency_ratio"),
        interval=tuple(interval) if interval else None,
        **{name: latency.get(name) for name in ("p50", "p90", "p99")},
        **{name: entry.get(name) for name in ("map", "map50", "params", "gmacs", "train_steps")},
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
