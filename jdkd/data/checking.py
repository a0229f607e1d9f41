"""See :func:`inspect_split`."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from jdkd.data.annotations import Annotations, inspect_annotations, open_annotations
from jdkd.data.images import MISSING, REMEDIES, ImageFault, no_warnings, verify_image
from jdkd.data.masks import read_segmentations
from jdkd.data.problems import Problem
from jdkd.data.splits import Split
from jdkd.errors import InputError, few
from jdkd.files import write_whole

SEVERITIES = ("error", "repair", "warning")
READERS = 8  # threads; most of their time is waiting for the disk


@dataclass(frozen=True)
class Inspection:
    """What was found in a split.

    Attributes:
        split: where it lies.
        annotations: the usable part of the annotations, or None.
        files: [N] where each of their images lies, relative to the images folder.
        digests: [N] of each file's bytes, where every image was decoded.
        problems: everything that is wrong, errors first.
        masks: how many boxes have a segmentation that can be used, where every image was decoded.
    """

    split: Split
    annotations: Annotations | None
    files: list[str]
    digests: list[bytes]
    problems: list[Problem]
    masks: int = 0

    @property
    def summary(self) -> str:
        """What the split holds and how much is wrong with it, in one line."""
        wrong = count_by_severity(self.problems)
        found = self.annotations
        if found is None:
            return f"nothing usable: {wrong}"
        boxes = f"{len(found.boxes):,} boxes" + (f" ({self.masks:,} with masks)" if self.masks else "")
        holds = f"{len(found.image_ids):,} images, {boxes}, {len(found.classes)} classes"
        return f"{holds}: {wrong or 'nothing wrong'}"


def count_by_severity(problems: Sequence[Problem]) -> str:
    """How many errors, repairs and warnings there are, in words."""
    counts = Counter()
    for problem in problems:
        counts[problem.severity] += problem.count
    return ", ".join(f"{counts[one]:,} {one}{'s' if counts[one] > 1 else ''}" for one in SEVERITIES if counts[one])


def inspect_split(
    split: Split, *, decode: bool = False, progress: Callable[[int, int], object] | None = None
) -> Inspection:
    """Find everything that is wrong with a split.

    Args:
        split: where images and annotations lie.
        decode: decode every image, and read segmentations. Otherwise an image's header is read and the end of its
            file looked at, and only what looks truncated is decoded; where annotations have an index, images that were
            all sound and whose files have not changed since (size, time, inode) are not looked at again.
        progress: called with how many of how many images are done.
    """
    annotations, problems = (inspect_annotations if decode else open_annotations)(split.annotations)
    if annotations is None:
        return Inspection(split, None, [], [], problems)
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
    seen = None if decode or faults else _seen_before(split, annotations, files)
    if seen is not None and seen.is_file():
        progress and progress(len(present), len(present))
        present = []
    with no_warnings():
        for done, (row, fault, digest) in enumerate(_in_threads(verify, present), 1):
            digests[row] = digest
            if fault:
                faults[row] = fault
            if progress:
                progress(done, len(present))
    if present and seen is not None and not faults:
        with suppress(OSError, InputError):
            seen.parent.mkdir(parents=True, exist_ok=True)
            write_whole(seen, f"{len(files)} images in {split.images.absolute()}\n", shared=True)
    names = [name if file is None else file for name, file in zip(annotations.file_names, files, strict=True)]
    problems += _as_problems(split, names, faults)
    problems += _same_bytes(split, names, digests)
    masks = 0
    if decode:
        _, masks, of_masks = read_segmentations(split.annotations, annotations)
        problems += of_masks
    problems.sort(key=lambda problem: problem.severity != "error")
    return Inspection(split, annotations, names, digests, problems, masks)


def _seen_before(split: Split, annotations: Annotations, files: list[str]) -> Path | None:
    """The file that is there if these very image files were all found sound; None without an index."""
    if annotations.index is None:
        return None
    digest = blake2b(f"{annotations.index.key} {split.images.absolute()}".encode(), digest_size=16)
    try:
        for file in files:
            found = os.stat(split.images / file)
            digest.update(b"%d %d %d " % (found.st_size, found.st_mtime_ns, found.st_ino))
    except OSError:
        return None
    return annotations.index.file.parents[1] / "images" / digest.hexdigest()


def compare_splits(train: Inspection, val: Inspection) -> list[Problem]:
    """What is wrong with two splits together: other classes, or images of one in the other.

    Args:
        train, val: as of :func:`inspect_split`, their images decoded.
    """
    if train.annotations is None or val.annotations is None:
        return []
    problems = []
    classes = train.annotations.classes, val.annotations.classes
    if classes[0] != classes[1]:
        what = f"has the classes {few(classes[1])}, the training data {few(classes[0])}"
        problems.append(
            Problem("other classes", val.split.annotations, [0], lambda _: what, "give splits of one data set")
        )
    seen = {digest: name for name, digest in zip(train.files, train.digests, strict=True) if digest}
    shared = [row for row, digest in enumerate(val.digests) if digest in seen]
    if shared:
        problems.append(
            Problem(
                "images that are in the training data too",
                val.split.images,
                shared,
                lambda row: f"image {val.files[row]} is {train.split.images / seen[val.digests[row]]}",
                "scored, though the detector was trained on them",
                "warning",
                len(val.files),
            )
        )
    return problems


def _same_bytes(split: Split, names: list[str], digests: list[bytes]) -> list[Problem]:
    """Images whose file is a copy of another one."""
    first: dict[bytes, int] = {}
    copies = [row for row, digest in enumerate(digests) if digest and first.setdefault(digest, row) != row]
    copies = [row for row in copies if names[row] != names[first[digests[row]]]]
    what, done = "images that are copies of another", "used as often, each time with its own boxes only"
    if not copies:
        return []
    return [
        Problem(
            what,
            split.images,
            copies,
            lambda row: f"image {names[row]} is the same as {names[first[digests[row]]]}",
            done,
            "warning",
            len(names),
        )
    ]


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
