"""What a user is told while the work goes on."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Notice"]

_said: set[str] = set()
_messengers: list[Callable[[str, str], None]] = []  # the last one is told


class Notice(UserWarning):
    """Something the user should know and need not act on: what was left out, replaced or chosen, with its values.

    Filter it as any warning. The command line prints it as one line on stderr.
    """


class ProgressCallback(Protocol):
    """Called with what is going on, how many parts of it are done, of how many, and figures to show beside it."""

    def __call__(self, what: str, done: int, total: int, values: Mapping[str, Any], /) -> None: ...


def say_once(sentence: str, key: str | None = None) -> None:
    """Warns with :class:`Notice`, once a process for every ``key``.

    Args:
        sentence: what happened, with the values and the remedy if there is one.
        key: what it is about; by default the sentence itself.
    """
    key = sentence if key is None else key
    if key in _said:
        return
    _said.add(key)
    if _messengers:
        _messengers[-1](sentence, key)
    else:
        warnings.warn(sentence, Notice, stacklevel=3)


@contextmanager
def told_to(messenger: Callable[[str, str], None]) -> Iterator[None]:
    """Hands what is said in this block, with its key, to ``messenger`` in place of a warning.

    For a process that works for another, which says it with :func:`say_once` in its turn.
    """
    _messengers.append(messenger)
    try:
        yield
    finally:
        _messengers.remove(messenger)
