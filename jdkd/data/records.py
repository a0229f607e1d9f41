"""See :class:`Records`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdkd.data.columns import Column, Columns
from jdkd.data.problems import Problem, Severity

PLURALS = {"image": "images", "annotation": "annotations", "category": "categories"}
_EXACT = 2.0**53  # from here on not every integer is a float


class Records:
    """One list of an annotation file as columns.

    The checks run on whole columns and look at single records only where a column is not sound, so that COCO's
    860,000 annotations take seconds. A fault is written down and its record marked; the others are read on.

    Args:
        kind: "image", "annotation" or "category".
        path: the annotation file.
        columns: the list, as read; n of its elements are objects.
        problems: where faults are added.

    Attributes:
        sound: [n] bool, those without a fault so far.
        ids: [n] int64; only those of sound records count.
        unread: for a key, the places where nothing usable stands.
    """

    def __init__(self, kind: str, path: Path, columns: Columns, problems: list[Problem]) -> None:
        self.kind, self.path, self.problems = kind, path, problems
        self.columns = columns
        self.sound = np.ones(len(columns), dtype=bool)
        self.unread: dict[str, list[int]] = {}
        plural = PLURALS[kind]
        self._add(
            f"{plural} that are no objects",
            list(columns.strangers),
            lambda place: f'"{plural}"[{place}] is {columns.strangers[place]!r}, not an object',
            f"correct it or remove the {kind}",
        )
        self.ids = self.integers("id")
        self._find_repeated_ids()

    def __len__(self) -> int:
        return len(self.columns)

    def column(self, key: str) -> Column:
        """What stands under a key, None where nothing does."""
        return self.columns.by_key[key]

    def name(self, place: int) -> str:
        """How a record is called in messages."""
        ids = self.column("id")
        number = f"number {self.columns.numbers[place]}"
        return f"{self.kind} {number if place in ids.absent else ids[place]}"

    def fault(
        self, kind: str, bad: np.ndarray | Sequence[int], describe: Callable[[int], str], remedy: str = ""
    ) -> None:
        """Write down a fault and mark its records.

        Args:
            kind: what it is, as of :class:`Problem`.
            bad: [n] bool, or the places of the records.
            describe: what is wrong with the record at a place, put after its name.
            remedy: by default, to correct or to remove the record.
        """
        places = np.flatnonzero(bad) if isinstance(bad, np.ndarray) and bad.dtype == bool else np.asarray(bad, int)
        self.sound[places] = False
        remedy = remedy or f"correct it or remove the {self.kind}"
        self._add(kind, places.tolist(), lambda place: f"{self.name(place)} {describe(place)}", remedy)

    def repair(
        self, kind: str, bad: np.ndarray, describe: Callable[[int], str], done: str, severity: Severity = "repair"
    ) -> None:
        """Write down what is put right on reading: as :meth:`fault`, but the records stay sound."""
        places = np.flatnonzero(bad).tolist()
        self._add(kind, places, lambda place: f"{self.name(place)} {describe(place)}", done, severity, len(self))

    def values(self, key: str) -> Column:
        """What stands under ``key`` in all records; where nothing does, None and a fault."""
        values = self.column(key)
        if values.absent:
            remedy = f"add it or remove the {self.kind}"
            self.fault(f"{PLURALS[self.kind]} without {key}", values.absent, lambda place: f'has no "{key}"', remedy)
            self.unread.setdefault(key, []).extend(values.absent)
        return values

    def numbers(self, key: str, width: int) -> np.ndarray:
        """The lists of so many finite numbers under ``key``: [n, width]; 0 where there is a fault."""
        values = self.values(key)
        column = _finite(values.array(), (len(values), width))
        if column is not None:
            return column
        singles = [_finite(_array([value]), (1, width)) for value in values]
        self._not(key, f"a list of {width} finite numbers", [place for place, one in enumerate(singles) if one is None])
        return np.concatenate([np.zeros((1, width)) if one is None else one for one in singles])

    def integers(self, key: str) -> np.ndarray:
        """The integers of 64 bits under ``key``, also those written as 3.0: [n] int64; 0 where there is a fault."""
        values = self.values(key)
        column = _finite(values.array(), (len(values),))
        if column is not None and (
            column.dtype.kind == "i"
            or (column.dtype.kind == "f" and (column == np.floor(column)).all() and (np.abs(column) < _EXACT).all())
        ):
            return column.astype(np.int64)
        found = [_integer(value) for value in values]
        self._not(key, "an integer of 64 bits", [place for place, one in enumerate(found) if one is None])
        return np.array([one or 0 for one in found], dtype=np.int64)

    def strings(self, key: str) -> list[str]:
        """The text under ``key``: [n]; empty where there is a fault."""
        values = list(self.values(key))
        self._not(key, "a name", [at for at, value in enumerate(values) if not (isinstance(value, str) and value)])
        return [value if isinstance(value, str) else "" for value in values]

    def _find_repeated_ids(self) -> None:
        ids = self.ids[self.sound]
        unique, counts = np.unique(ids, return_counts=True)
        if len(unique) == len(ids):
            return
        repeated = dict(zip(unique[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True))
        first: dict[int, int] = {}
        again: dict[int, int] = {}  # place of a record whose id stood before: where it did
        for place in np.flatnonzero(self.sound & np.isin(self.ids, list(repeated))).tolist():
            number = int(self.ids[place])
            if number in first:
                again[place] = first[number]
            first.setdefault(number, place)

        def describe(place: int) -> str:
            times, before = repeated[int(self.ids[place])], self.columns.numbers[again[place]]
            return f"stands {times} times (records number {before} and {self.columns.numbers[place]})"

        self.fault(f"a repeated {self.kind} id", list(again), describe, f"give every {self.kind} an id of its own")

    def _not(self, key: str, wanted: str, places: list[int]) -> None:
        """Writes down that what stands there is not what is wanted, where anything does."""
        values = self.column(key)
        absent = set(values.absent)
        places = [place for place in places if place not in absent]

        def describe(place: int) -> str:
            return f'has "{key}" {_short(values[place])}, not {wanted}'

        self.fault(f'{PLURALS[self.kind]} with a wrong "{key}"', places, describe)
        self.unread.setdefault(key, []).extend(places)

    def _add(
        self,
        kind: str,
        places: Sequence[int],
        describe: Callable[[int], str],
        remedy: str,
        severity: Severity = "error",
        total: int = 0,
    ) -> None:
        if len(places):
            self.problems.append(Problem(kind, self.path, places, describe, remedy, severity, total))


def _array(values: list[Any]) -> np.ndarray | None:
    try:
        return np.array(values)
    except (ValueError, TypeError, OverflowError):
        return None


def _finite(column: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array, or None where it is not of finite numbers and of that shape."""
    if not shape[0]:
        return np.zeros(shape, dtype=np.int64)
    if column is None:
        return None
    right = column.shape == shape and column.dtype.kind in "iuf" and np.isfinite(column).all()
    return column if right else None


def _integer(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    right = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return value if right else None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
