"""Images that two data sets have in common, whatever they are called."""

from collections import defaultdict
from collections.abc import Sequence

from jdkd.data.coco import CocoDetectionDataset
from jdkd.files import sha256_of
from jdkd.notices import say_once

SHOWN = 3  # examples in a message


def copies(dataset: CocoDetectionDataset, other: CocoDetectionDataset) -> list[int]:
    """Indices of the images of ``dataset`` whose files an image of ``other`` equals byte for byte."""
    files, by_size = dataset.files, defaultdict(list)
    for file in other.files:
        by_size[file.stat().st_size].append(file)
    sizes = [file.stat().st_size for file in files]
    twins = {sha256_of(file) for size in set(sizes) for file in by_size.get(size, ())}  # only these have to be read
    return [i for i, file in enumerate(files) if sizes[i] in by_size and sha256_of(file) in twins]


def say_copies(dataset: CocoDetectionDataset, shared: Sequence[int], what: str, so: str) -> None:
    """Says which images of ``dataset`` are others too, and what follows; nothing where none are ``shared``."""
    if not shared:
        return
    names = ", ".join(dataset.files[index].name for index in shared[:SHOWN])
    more = ", ..." if len(shared) > SHOWN else ""
    named = f"{len(shared)} of the {len(dataset)} images of {dataset.split.annotations}"
    say_once(f"{named} are {what} too, byte for byte ({names}{more}); {so}.")


def say_if_trained_on(val: CocoDetectionDataset, train: CocoDetectionDataset) -> None:
    """Says which of the images that are to be scored on are training images too."""
    so = "they are scored all the same, and flatter the detector; give others to validate on"
    say_copies(val, copies(val, train), "training images", so)
