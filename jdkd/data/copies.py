"""Images that two data sets have in common, whatever they are called."""

from collections.abc import Sequence
from pathlib import Path

from jdkd.data.coco import CocoDetectionDataset
from jdkd.files import sha256_of
from jdkd.notices import say_once

SHOWN = 3  # examples in a message
BEGINNING = 4096  # bytes of a file


def copies(dataset: CocoDetectionDataset, other: CocoDetectionDataset) -> list[int]:
    """Indices of the images of ``dataset`` whose files an image of ``other`` equals byte for byte.

    A file is read whole only where one of the same size begins alike.
    """
    own, others = dataset.files, other.files
    sizes = {file: file.stat().st_size for file in (*own, *others)}
    shared = {sizes[file] for file in own} & {sizes[file] for file in others}
    begins = {file: (sizes[file], _beginning(file)) for file in sizes if sizes[file] in shared}
    known = {begins[file] for file in others if file in begins} & {begins[file] for file in own if file in begins}
    twins = {sha256_of(file) for file in others if begins.get(file) in known}
    return [i for i, file in enumerate(own) if begins.get(file) in known and sha256_of(file) in twins]


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(BEGINNING)


def say_copies(dataset: CocoDetectionDataset, shared: Sequence[int], what: str, so: str) -> None:
    """Says which images of ``dataset``, the ``shared`` ones, are others too, and what follows."""
    names = ", ".join(dataset.files[index].name for index in shared[:SHOWN])
    more = ", ..." if len(shared) > SHOWN else ""
    named = f"{len(shared)} of the {len(dataset)} images of {dataset.split.annotations}"
    say_once(f"{named} are {what} too, byte for byte ({names}{more}); {so}.")


def say_if_trained_on(val: CocoDetectionDataset, train: CocoDetectionDataset) -> None:
    """Says which of the images that are to be scored on are training images too."""
    so = "they are scored all the same, and flatter the detector; give others to validate on"
    if shared := copies(val, train):
        say_copies(val, shared, "training images", so)
