"""See :func:`evaluate`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from jdkd.data import in_order
from jdkd.detect import fix_roi_scales
from jdkd.detect.architecture import known_architecture
from jdkd.detect.contract import capped, detections
from jdkd.detect.heads import known_classes
from jdkd.detect.input_size import require_visible, require_whole
from jdkd.detect.sources import builders_of
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import say_once
from jdkd.train.distributed import from_first, gathered, processes, rank
from jdkd.train.findings import Findings
from jdkd.train.scoring import COCO_DETECTIONS, Scores, score


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    device: torch.device | str,
    batch_size: int = 8,
    workers: int = 0,
    max_detections: int | None = None,
    shared: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores a detector on every image of a dataset, those without annotations included.

    Detections whose box, score or mask is not finite are left out, which is said once with their number. Masks are
    scored beside boxes where the detector gives them and the data have segmentations.

    Args:
        model: any detector with torchvision's interface; moved to ``device``, its modules keep their mode. Scales of
            RoI pools that were inferred wrongly are set right, see :func:`jdkd.detect.fix_roi_scales`.
        dataset: a :class:`jdkd.data.coco.CocoDetectionDataset`; its ``coco`` is the ground truth.
        device: where to run.
        batch_size: images per forward.
        workers: processes that read images.
        max_detections: how many detections an image the detector may make and are scored, those of the highest
            scores; by default as many as its builder was asked for, and 100 without one, which is COCO's rule.
        shared: inside of a process group (:mod:`jdkd.train.distributed`), where all processes call this with the same
            model: each runs it on its share of the images, the first scores what all have found.
        progress: called with (images done, images) after every batch.

    Returns:
        The scores, in all processes that share; a detector that finds nothing has a ``map`` of 0. Where no image of
        the dataset has a box to detect there is nothing to score: all numbers are -1, which is said once.

    Raises:
        InputError: the model is no such detector, its classes are not the dataset's, a label is none of them, an
            image is too elongated for its input size, no detection is finite, or an argument is not positive.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"evaluate takes a detector, a torch.nn.Module; got a {type(model).__name__}.")
    most = _asked_for(unwrapped(model)) if max_detections is None else max_detections
    require_whole({"batch_size": batch_size, "max_detections": most})
    prepare(model, dataset)
    start, every = (rank(), processes()) if shared else (0, 1)

    def part() -> Findings:
        read: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "start": start, "every": every}
        return find(model, dataset, device=device, max_detections=max_detections, progress=progress, **read)

    parts = gathered(part) if shared else [part()]
    return from_first(lambda: scored(parts, dataset, most)) if shared else scored(parts, dataset, most)


def prepare(model: nn.Module, dataset: Any) -> None:
    """Sets the scales of a detector's RoI pools right, after it was found to be one for a dataset.

    Raises:
        InputError: its classes are not the dataset's, or an image is too elongated for its input size.
    """
    require_same_classes(unwrapped(model), dataset.classes, dataset.label_to_category)
    require_visible(model, getattr(dataset, "sizes", ()))
    fix_roi_scales(model)


def find(
    model: nn.Module,
    dataset: Any,
    *,
    device: torch.device | str,
    max_detections: int | None = None,
    masks: bool = True,
    every: int = 1,
    progress: Callable[[int, int], None] | None = None,
    **read: Any,
) -> Findings:
    """What a detector finds on the images of a dataset, or on every so many of them.

    Args:
        model, dataset, device, max_detections, progress: as of :func:`evaluate`, which checks them.
        masks: keep those of detectors that give some, where there are masks to score them against.
        every: one of so many images is looked at.
        read: ``batch_size``, ``workers`` and ``start`` of :func:`jdkd.data.in_order`.
    """
    findings, done = Findings(type(unwrapped(model)).__name__, dataset.label_to_category), 0
    pin = torch.device(device).type == "cuda"
    with mode(model.to(device), training=False), capped(model, max_detections), torch.inference_mode():
        for items in in_order(dataset, every=every, pin=pin, **read):
            found = detections(model, [image.to(device, non_blocking=True).float() / 255 for image, _ in items])
            for (_, target), detection in zip(items, found, strict=True):
                findings.add(target["image_id"], detection, masks and "masks" in detection and _segmented(dataset))
            done += len(items)
            if progress:
                progress(min(done * every, len(dataset)), len(dataset))
    return findings


def scored(parts: list[Findings], dataset: Any, most: int) -> Scores:
    """What all parts of the detections of a dataset score together, ``most`` of them an image.

    Raises:
        ModelError: none of them can be scored.
    """
    findings = parts[0]
    for other in parts[1:]:
        findings.merge(other)
    rows = findings.close()
    masks = [{key: value for key, value in row.items() if key != "bbox"} for row in rows if "segmentation" in row]
    boxes = score(dataset, rows, most)
    if not findings.masks:
        return boxes
    return dataclasses.replace(boxes, segm=score(dataset.with_masks(), masks, most, "segm"))


def _segmented(dataset: Any) -> bool:
    """Whether there are masks to score a detector's against; that there are none is said once."""
    segmented = getattr(dataset, "segmented", False)
    if not segmented:
        say_once("the detector gives masks, and the data have no segmentation to score them against; boxes are scored")
    return segmented


def _asked_for(model: nn.Module) -> int:
    """Detections an image that a detector was asked for since it was built, or its builder; else COCO's number."""
    known = known_architecture(model)
    if known is None:
        return COCO_DETECTIONS
    since = [number for name, number in known.attributes.items() if name.split(".")[-1] == "detections_per_img"]
    asked = [*since, *(each.arguments.get("max_detections") for each in builders_of(known))]
    return next((number for number in asked if number is not None), COCO_DETECTIONS)


def require_same_classes(model: nn.Module, classes: tuple[str, ...], categories: list[int]) -> None:
    """Refuses a detector that was made for other classes, or for the same ones in another order.

    Where the number of classes does not show, :class:`Findings` checks the labels.
    """
    architecture = known_architecture(model)
    names = architecture.classes if architecture else ()
    known = len(names) or known_classes(model)
    if known is None:
        return
    if known != len(classes):
        remedy = "evaluate it on the data it was made for, or train one for this data"
        if known == categories[-1]:
            remedy = "if its labels are category ids, as torchvision's of COCO are, wrap it so that label k is class k"
        raise InputError(f"the detector knows {known} classes and the dataset has {len(classes)}; {remedy}.")
    if names and names != tuple(classes) and sorted(names) == sorted(classes):
        raise InputError(
            f"the detector has its classes in the order {', '.join(names)} and the dataset in the "
            f"order {', '.join(classes)}; number the categories of the annotations as the detector does."
        )
