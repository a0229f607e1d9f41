"""What a user is told once, while the work goes on."""

import warnings

_said: set[str] = set()


class Notice(UserWarning):
    """Something the user should know and need not act on: what was left out, replaced or chosen, with its values.

    Filter it as any warning. The command line prints it as one line on stderr.
    """


def say_once(sentence: str, key: str | None = None) -> None:
    """Warns with :class:`Notice`, once a process for every ``key``.

    Args:
        sentence: what happened, with the values and the remedy if there is one.
        key: what it is about; by default the sentence itself.
    """
    key = sentence if key is None else key
    if key not in _said:
        _said.add(key)
        warnings.warn(sentence, Notice, stacklevel=3)
