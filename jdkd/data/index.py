"""What was read of a large file once, kept as arrays that are mapped into memory: see :func:`index_of`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jdkd.errors import InputError
from jdkd.files import cache_folder, content_hash, write_whole
from jdkd.notices import say_once

LEAST_BYTES = 2**20  # of an annotation file; a smaller one is read anew in some milliseconds
_MAGIC = b"jdkdidx1"
_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Index:
    """Where the index of a file is or will be.

    Attributes:
        source: the file.
        key: of its content, and of the code that reads it: 64 hexadecimal digits.
        file: of the index.
        state: size and time of the source when its content was looked at.
    """

    source: Path
    key: str
    file: Path
    state: tuple[int, int]

    def read(self) -> Contents | None:
        """What is kept, mapped; None where nothing is, or not all of it."""
        return read_contents(self.file)

    def write(self, arrays: Mapping[str, np.ndarray], facts: Any) -> Contents | None:
        """Keeps arrays and JSON-able facts, and maps them; None where they cannot be kept, which is said once.

        Nothing is kept of a source that has changed since its content was looked at.
        """
        if _state(self.source) != self.state:
            return None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, _packed(arrays, facts), shared=True)
        except (OSError, InputError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
            say_once(
                f"{self.source} is read anew whenever it is opened, as its index cannot be kept in {self.file.parent} "
                f"({reason}); set JDKD_CACHE to a folder that can be written",
                key=f"no index in {self.file.parent}",
            )
            return None
        return self.read()


@dataclass(frozen=True)
class Contents:
    """What an index holds: arrays that are read from its file when they are looked at, and facts."""

    file: Path
    arrays: dict[str, np.ndarray]
    facts: Any


def index_of(source: Path, kind: str) -> Index | None:
    """The index of a file, under the user's cache folder (``JDKD_CACHE``).

    It is found by the content of the file and by the code that reads it, so it is never out of date, wherever the file
    lies; one that is no longer wanted may be deleted at any time.

    Args:
        source: an annotation file.
        kind: what of it is kept.

    Returns:
        The index; None where the file is small, cannot be read, or there is no folder to keep an index in.
    """
    folder, state = cache_folder(), _state(source)
    if folder is None or state is None or state[0] < LEAST_BYTES:
        return None
    try:
        key = hashlib.sha256(f"{content_hash(source)} {_code()}".encode()).hexdigest()
    except InputError:  # whoever reads it says so
        return None
    return Index(source, key, folder / kind / f"{key[:32]}.index", state)


def read_contents(file: Path) -> Contents | None:
    """What an index file holds; None where it is not there, or not whole."""
    try:
        mapped = np.asarray(np.memmap(file, mode="r"))  # [bytes]
        length = int.from_bytes(mapped[8:16].tobytes(), "little")
        header = json.loads(mapped[16 : 16 + length].tobytes())
        if mapped[:8].tobytes() != _MAGIC or header["bytes"] != len(mapped):
            return None
        arrays = {}
        for name, (dtype, shape, start) in header["arrays"].items():
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            arrays[name] = mapped[start : start + size].view(dtype).reshape(shape)
        return Contents(file, arrays, header["facts"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _packed(arrays: Mapping[str, np.ndarray], facts: Any) -> bytearray:
    """The bytes of an index: its length and a header, then the arrays, each on a boundary of its own."""
    places: dict[str, list[Any]] = {}
    header = {"bytes": 10**15, "arrays": places, "facts": facts}
    end = 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, list(array.shape), 10**15 + end]
        end += -(-array.nbytes // _ALIGNED) * _ALIGNED
    text = json.dumps(header)  # with numbers as wide as any that may stand there
    first = -(-(16 + len(text)) // _ALIGNED) * _ALIGNED
    for place in places.values():
        place[2] += first - 10**15
    header["bytes"] = first + end
    text = json.dumps(header).ljust(len(text))
    content = bytearray(first + end)
    content[:first] = (_MAGIC + len(text).to_bytes(8, "little") + text.encode()).ljust(first, b"\0")
    for name, array in arrays.items():
        start = places[name][2]
        content[start : start + array.nbytes] = array.tobytes()
    return content


def text_as_arrays(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Many texts as their bytes one after the other, [bytes] uint8, and where each ends, [n] int64."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return np.frombuffer(b"".join(texts), dtype=np.uint8), ends


class Texts:
    """The same texts again, each read when it is asked for."""

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self.content, self.ends = content, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> bytes:
        if not 0 <= place < len(self.ends):
            raise IndexError(place)
        start = self.ends[place - 1] if place else 0
        return self.content[start : self.ends[place]].tobytes()


@cache
def _code() -> str:
    """SHA-256 of the code that decides what is read of a file."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _state(file: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
