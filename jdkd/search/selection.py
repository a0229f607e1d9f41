"""Which images select and which report: new to every training, and to each other.

What a detector was trained on flatters it. The base knows all training images, so neither the search's choices nor its
result may rest on any of them, or on an image that the other rests on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jdkd.data import CocoDetectionDataset
from jdkd.data.copies import SHOWN, copies, say_copies
from jdkd.errors import InputError
from jdkd.files import sha256_of
from jdkd.notices import say_once

REMEDY = "give more of them, or others to select on with --selection-images and --selection-annotations"
EXAMPLES = 6  # images that a report shows


@dataclass(frozen=True)
class Part:
    """Images that select, or that report.

    Args:
        dataset: the images.
        which: which of the split's images they are, in words.
    """

    dataset: CocoDetectionDataset
    which: str

    @property
    def boxes(self) -> int:
        return sum(map(len, self.dataset.labels))

    def to_json(self) -> dict[str, Any]:
        """Where they lie and what they are, for the result."""
        split = self.dataset.split
        return {
            "image_folder": str(split.images),
            "annotations": str(split.annotations),
            "which": self.which,
            "images": len(self.dataset),
            "boxes": self.boxes,
            "examples": [name for name, _, _ in self.dataset.sizes[:EXAMPLES]],
            "fingerprint": self.dataset.fingerprint,
        }


def divide(
    train: CocoDetectionDataset, val: CocoDetectionDataset, selection: CocoDetectionDataset | None = None
) -> tuple[Part, Part]:
    """The images that select and those that report.

    By default one half of ``val`` selects and the other reports. Which one an image is in follows from the bytes of its
    file: neither seed, name nor order changes it, and two copies of an image are in one half.

    Args:
        train: what base, pool and students are trained on.
        val: the validation split.
        selection: images to select on instead; all of ``val`` reports then.

    Returns:
        The selecting and the reporting part. Images that share a file's content with ``train``, and those of
        ``selection`` that do with ``val``, are in neither, which is said once.

    Raises:
        InputError: no image with a box is left to select on, or none to report on.
    """
    fresh = _without(val, train, "training images", "they neither select nor report")
    if selection is None:
        chosen, rest = _halves(fresh)
        parts = (
            Part(fresh.subset(chosen), "half, the lower SHA-256 of image files"),
            Part(fresh.subset(rest), "half, the higher SHA-256 of image files"),
        )
    else:
        selection = _without(selection, train, "training images", "they do not select")
        selection = _without(selection, val, "validation images, which report", "they do not select")
        parts = Part(selection, "all"), Part(fresh, "all")
    for part, does in zip(parts, ("select", "report"), strict=True):
        _check_boxes(part, does)
    return parts


def say_if_trained_elsewhere(what: str, trained_on: str | None, train: CocoDetectionDataset) -> None:
    """A detector that was trained on other images than a search trains on may know those that select.

    Args:
        what: the detector, in words.
        trained_on: fingerprint of its training images, where it is known.
        train: what the search trains on.
    """
    if trained_on is None or not train.known_as(trained_on):
        was = "was trained on other data than" if trained_on else "does not say whether it was trained on"
        say_once(
            f"{what} {was} {train.split.annotations}; if it saw images that select or report, its scores there "
            "flatter it."
        )


def _halves(val: CocoDetectionDataset) -> tuple[list[int], list[int]]:
    """Indices of one half and of the other; images with a box and images without are halved by themselves."""
    contents = [sha256_of(file) for file in val.files]
    labelled = {content for content, labels in zip(contents, val.labels, strict=True) if len(labels)}
    if len(labelled) < 2:
        raise InputError(
            f"{val.split.annotations} has {len(val)} images to select and to report on, {len(labelled)} of them with a "
            f"box; one half selects and the other reports, which takes at least 2 with a box: {REMEDY}."
        )
    empty = set(contents) - labelled
    count = len(labelled) // 2, len(labelled | empty) // 2 - len(labelled) // 2
    chosen = {*sorted(labelled)[: count[0]], *sorted(empty)[: count[1]]}
    selects = [content in chosen for content in contents]
    return np.flatnonzero(selects).tolist(), np.flatnonzero(np.logical_not(selects)).tolist()


def _without(dataset: CocoDetectionDataset, other: CocoDetectionDataset, what: str, so: str) -> CocoDetectionDataset:
    """The images of ``dataset`` whose files no image of ``other`` equals byte for byte."""
    shared = copies(dataset, other)
    if not shared:
        return dataset
    if len(shared) == len(dataset):
        raise InputError(
            f"all {len(dataset)} images of {dataset.split.annotations} are {what} too, byte for byte; give images that "
            "no detector of this search is trained on, and none that both select and report."
        )
    say_copies(dataset, shared, what, so)
    return dataset.subset(np.setdiff1d(range(len(dataset)), shared))


def _check_boxes(part: Part, does: str) -> None:
    """Refuses a part without a box, and says which classes have none."""
    dataset = part.dataset
    if not part.boxes:
        raise InputError(
            f"the {len(dataset)} images of {dataset.split.annotations} that {does} ({part.which}) hold no box, so that "
            f"every detector would score -1: {REMEDY}."
        )
    present = set(np.concatenate(dataset.labels).tolist())
    missing = [name for label, name in enumerate(dataset.classes, start=1) if label not in present]
    if missing:
        named = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        say_once(
            f"the {len(dataset)} images of {dataset.split.annotations} that {does} hold no box of {len(missing)} of "
            f"the {len(dataset.classes)} classes ({named}); these have no part in their mAP."
        )
