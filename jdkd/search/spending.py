"""What a search spends its time on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spending:
    """Seconds of wall-clock time of one process, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts what is done inside under ``what``, and no longer under what it is done for."""
        self._count()
        self._within.append(what)
        try:
            yield
        finally:
            self._count()
            self._within.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        if self._within:
            self.seconds[self._within[-1]] = self.seconds.get(self._within[-1], 0.0) + now - self._since
        self._since = now
