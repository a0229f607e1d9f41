"""See :func:`inspect_split`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from jdkd.data.annotations import Annotations, inspect_annotations
from jdkd.data.images import MISSING, REMEDIES, ImageFault, no_warnings, verify_image
from jdkd.data.problems import Problem
from jdkd.data.splits import Split

Progress = Callable[[int, int], object]

READERS = 8  # threads; most of their time is waiting for the disk


@dataclass(frozen=True)
class Inspection:
    """What was found in a split.

    Attributes:
        annotations: the usable part of the annotations, or None.
        files: [N] where each of their images lies, relative to the images folder.
        digests: [N] of each file's bytes, where every image was decoded.
        problems: everything that is wrong, errors first.
    """

    annotations: Annotations | None
    files: list[str]
    digests: list[bytes]
    problems: list[Problem]


def inspect_split(split: Split, *, decode: bool = False, progress: Progress | None = None) -> Inspection:
    """Find everything that is wrong with a split.

    Args:
        split: where images and annotations lie.
        decode: decode every image. Otherwise its header is read and the end of its file looked at, and only what
            looks truncated is decoded.
        progress: called with how many of how many images are done.
    """
    annotations, problems = inspect_annotations(split.annotations)
    if annotations is None:
        return Inspection(None, [], [], problems)
    listing = _Listing(split.images)
    files = [listing.find(name) for name in annotations.file_names]
    faults: dict[int, ImageFault] = {}
    for row, name in enumerate(annotations.file_names):
        if files[row] is None:
            faults[row] = ImageFault(MISSING, f"is missing{listing.hint(name)}")
    present = [row for row, file in enumerate(files) if file is not None]
    sizes = annotations.sizes.tolist()

    def verify(row: int) -> tuple[int, ImageFault | None, bytes]:
        path = split.images / files[row]
        try:
            verify_image(path, tuple(sizes[row]), decode=decode)
            return row, None, blake2b(path.read_bytes(), digest_size=16).digest() if decode else b""
        except ImageFault as fault:
            return row, fault, b""

    digests = [b""] * len(files)
    with no_warnings():
        for done, (row, fault, digest) in enumerate(_in_threads(verify, present), 1):
            digests[row] = digest
            if fault:
                faults[row] = fault
            if progress:
                progress(done, len(present))
    names = [name if file is None else file for name, file in zip(annotations.file_names, files, strict=True)]
    problems += _as_problems(split, names, faults)
    problems.sort(key=lambda problem: problem.severity != "error")
    return Inspection(annotations, names, digests, problems)


def _in_threads(task: Callable[[int], object], places: Sequence[int]) -> Iterator:
    """Yields the results in order; one that is left early stops at the images under way."""
    pool = ThreadPoolExecutor(READERS)
    try:
        yield from pool.map(task, places)
    finally:
        pool.shutdown(cancel_futures=True)


def _as_problems(split: Split, names: list[str], faults: dict[int, ImageFault]) -> list[Problem]:
    flag = f"--{split.name}-images" if split.name else "the images folder"
    by_kind: dict[str, list[int]] = {}
    for row in sorted(faults):
        by_kind.setdefault(faults[row].kind, []).append(row)

    def describe(row: int) -> str:
        return f"image {split.images / names[row]} {faults[row].what}"

    return [
        Problem(
            kind,
            split.images,
            rows,
            describe,
            f"put them there or correct {flag}" if kind == MISSING else REMEDIES[kind],
            total=len(names),
        )
        for kind, rows in by_kind.items()
    ]


class _Listing:
    """The files below a folder, by one listing per folder instead of one look per file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, set[str]] = {}
        self._folded: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> str | None:
        """The file that is meant by a name; backslashes separate folders unless a file is called so."""
        normal = name.replace("\\", "/")
        return next((file for file in dict.fromkeys((normal, name)) if self._holds(file)), None)

    def hint(self, name: str) -> str:
        """What is there under nearly the same name, in words."""
        folder, _, last = name.replace("\\", "/").rpartition("/")
        if folder not in self._folded:
            self._folded[folder] = {_folded(file): file for file in self._files(folder)}
        alike = self._folded[folder].get(_folded(last))
        return f", but {alike!r} is there" if alike else ""

    def _holds(self, file: str) -> bool:
        folder, _, last = file.rpartition("/")
        return last in self._files(folder)

    def _files(self, folder: str) -> set[str]:
        if folder not in self._folders:
            try:
                self._folders[folder] = set(os.listdir(self.root / folder))
            except OSError:
                self._folders[folder] = set()
        return self._folders[folder]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
