"""Errors that a user can act on, and how they name things."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["InputError", "ModelError"]


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the argument or file, the values that clash and the remedy. It is
    raised before anything is written. The command line prints it without a traceback and exits with code 2.
    """


class ModelError(InputError):
    """A model that cannot be trained or scored: its losses or detections are not finite, or it leaves too little of
    the images. Whoever has others, a search for one, may go on without it.
    """


def few(names: Sequence[str]) -> str:
    """The first names of many, and how many there are."""
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"


def one_of_these(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is not known: the one that it may be a slip of, where there is such a one."""
    near = get_close_matches(name, list(known), 1)
    return f"give {near[0]}, if that was meant, or another of these" if near else "give one of these"


def require_batches(read: object, who: str) -> None:
    """Refuses, with :class:`InputError`, that ``who`` was given no batch of images: that nothing was ``read``."""
    if not read:
        raise InputError(f"{who} was given 0 batches and needs at least 1; give it some images.")


def said(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
