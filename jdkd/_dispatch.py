"""How one of several implementations of a computation is picked: the first of a table that does not say why not.

A table lists implementations, best first. The backends of an operator (:mod:`jdkd._backend`), the kernels of an elastic
convolution (:mod:`jdkd.ops.elastic_kernels`) and of the levels of a pyramid (:mod:`jdkd.ops.elastic_levels`), and the
forms of the Pearson loss (:mod:`jdkd.ops.pearson_forms`) are such tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

NOT_YET = "it was not checked on this device yet, and is not while a graph is captured or a program traced"


class Implementation(Protocol):
    """A row of a table: its name, what speaks for it in one clause, and what it says of a call."""

    name: str
    why: str

    def why_not(self, call: Any) -> str | None:
        """Why it does not take a call, in one clause; None if it does."""


def first(table: Iterable[Implementation], call: Any) -> tuple[Implementation | None, bool]:
    """The first implementation that takes a call, if any.

    Args:
        table: best first.
        call: what the rows of the table decide by.

    Returns:
        The row, and whether it stays so: one before it that is not checked yet may take the same call later.
    """
    is_settled = True
    for row in table:
        reason = row.why_not(call)
        if reason is None:
            return row, is_settled
        is_settled = is_settled and reason != NOT_YET
    return None, is_settled


def explain(table: Iterable[Implementation], call: Any) -> tuple[Implementation, tuple[tuple[str, str], ...]]:
    """Says why a call is computed as it is.

    Args:
        table: best first; its last row takes every call.
        call: what the rows decide by.

    Returns:
        The first row that takes the call; name of every other row, and why it is not taken.
    """
    rows = tuple(table)
    chosen, _ = first(rows, call)
    others = [row for row in rows if row is not chosen]
    return chosen, tuple((row.name, row.why_not(call) or f"{chosen.name} comes first") for row in others)
