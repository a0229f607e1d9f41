"""See :func:`read_object`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 2**20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER = frozenset(" \t\n\r,:]}")  # what may follow a number; all other values show where they end
_decode = json.JSONDecoder().raw_decode


class Unusual(Exception):
    """Text that is not read here; it may be JSON all the same."""


def read_object(path: Path, lists: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Reads the object in a JSON file member by member, and lists in it element by element, in little memory.

    Args:
        path: the file, UTF-8.
        lists: names of members whose elements are read one by one.

    Yields:
        Name and value of a member; of such a list, the name with each of its elements, after the name with ``[]``.

    Raises:
        Unusual: the file holds something else than an object, a member twice, or no JSON, perhaps after members were
            yielded. ``json.load`` says what is wrong with it.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = _Text(file)
        names: set[str] = set()
        text.take("{")
        while (name := text.value() if text.next() != "}" else None) is not None:
            if not isinstance(name, str) or name in names:
                raise Unusual
            names.add(name)
            text.take(":")
            if name in lists and text.next() == "[":
                yield name, []
                for element in text.elements():
                    yield name, element
            else:
                yield name, text.value()
            if text.next() != ",":
                break
            text.take(",")
            if text.next() != '"':
                raise Unusual
        text.take("}")
        if text.next():
            raise Unusual


class _Text:
    """The text of a file, of which a window is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False

    def next(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read_on()

    def take(self, character: str) -> None:
        if self.next() != character:
            raise Unusual
        self.at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except ValueError as error:
                if self.ended:
                    raise Unusual from error
            else:
                if self.ended or self.text[end - 1] in '"]}' or self.text[end : end + 1] in _AFTER:
                    self.at = end
                    return value
            self._read_on()

    def elements(self) -> Iterator[Any]:
        self.take("[")
        if self.next() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.next() == "]":
                self.at += 1
                return
            self.take(",")

    def _read_on(self) -> None:
        """Takes in as much as there is under way, so that a long value is begun anew only a few times."""
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more
