"""See :class:`Columns`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

CHUNK = 2**13  # records
ABSENT = object()


class Column:
    """What stands under one key in many records. Numbers, and lists of as many numbers each, are kept as arrays.

    Attributes:
        absent: the places of records that do not have the key; there, the value is None.
    """

    def __init__(self) -> None:
        self.absent: list[int] = []
        self._chunks: list[np.ndarray | list[Any]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> Any:
        chunk, within = divmod(int(place), CHUNK)
        value = self._chunks[chunk][within]
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

    def __iter__(self) -> Iterator[Any]:
        return (value for chunk in self._chunks for value in (chunk if isinstance(chunk, list) else chunk.tolist()))

    def extend(self, values: list[Any]) -> None:
        """Takes a chunk of values, ``ABSENT`` where there is none; all chunks but the last have ``CHUNK`` of them."""
        if ABSENT in values:
            self.absent += [self._size + place for place, value in enumerate(values) if value is ABSENT]
            values = [None if value is ABSENT else value for value in values]
        self._chunks.append(_compact(values))
        self._size += len(values)

    def array(self) -> np.ndarray | None:
        """All values as numpy makes an array of them; None where it cannot."""
        try:
            if all(isinstance(chunk, np.ndarray) for chunk in self._chunks):
                return np.concatenate(self._chunks)
            return np.array(list(self))
        except (ValueError, TypeError, OverflowError):
            return None


def _compact(values: list[Any]) -> np.ndarray | list[Any]:
    """The values as an array that gives them back, or as they are."""
    kinds = set(map(type, values))
    if kinds == {list}:
        if len(set(map(len, values))) > 1:
            return values
        kinds = {type(one) for value in values for one in value}
    if kinds not in ({int}, {float}):
        return values
    try:
        return np.array(values, dtype=np.int64 if kinds == {int} else np.float64)
    except OverflowError:
        return values


class Columns:
    """The records of a list, by key: a tenth of the memory that objects take.

    Args:
        keys: what is kept of a record.

    Attributes:
        numbers: place in the list of each record; elements that are no objects are none.
        strangers: those elements, by their place in the list.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.by_key = {key: Column() for key in keys}
        self.numbers: list[int] | range = range(0)
        self.strangers: dict[int, Any] = {}
        self._waiting: list[dict[str, Any]] = []
        self._taken = self._size = 0

    @classmethod
    def of(cls, elements: Iterable[Any], keys: tuple[str, ...]) -> Columns:
        """Those of a list."""
        columns = cls(keys)
        for element in elements:
            columns.add(element)
        columns.close()
        return columns

    def __len__(self) -> int:
        return self._size

    def add(self, element: Any) -> None:
        """Takes the next element of the list."""
        if isinstance(element, dict):
            self._waiting.append(element)
            if isinstance(self.numbers, list):
                self.numbers.append(self._taken)
            if len(self._waiting) == CHUNK:
                self._store()
        else:
            if isinstance(self.numbers, range):
                self.numbers = list(range(self._taken))
            self.strangers[self._taken] = element
        self._taken += 1

    def close(self) -> None:
        """Takes in what is left; nothing is added afterwards."""
        self._store()
        if isinstance(self.numbers, range):
            self.numbers = range(self._size)

    def _store(self) -> None:
        if self._waiting:
            for key, column in self.by_key.items():
                column.extend([record.get(key, ABSENT) for record in self._waiting])
        self._size += len(self._waiting)
        self._waiting = []
