"""See :func:`table`."""

from collections.abc import Iterable, Sequence

RULES = {"l": "---", "r": "---:"}


def table(headings: Sequence[str], sides: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table.

    Args:
        headings: of the columns.
        sides: of each column, ``l`` for words and ``r`` for numbers; the last letter is that of all that follow.
        rows: their cells.
    """
    rule = [RULES[side] for side in sides.ljust(len(headings), sides[-1])]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (headings, rule, *rows))
