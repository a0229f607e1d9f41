"""Does this teacher see anything? The objects of a few images that it finds, before it teaches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from jdkd.distill.route import module_of
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import say_once

OVERLAP = 0.5  # of a box with an object's, intersection over union, from which on it is found


class Recall(NamedTuple):
    """How many of how many objects a detector found."""

    found: int
    objects: int


@torch.no_grad()
def recall_of(model: nn.Module, batches: Iterable[Any]) -> Recall:
    """The objects that some box of a detector lies on, of whatever class.

    Args:
        model: a detector, run in evaluation mode.
        batches: ``(images, targets)``, images ``[3, H, W]`` in 0..1, and ``boxes`` [M, 4] xyxy in pixels.

    Raises:
        InputError: a batch has no targets, or the model does not detect.
    """
    from torchvision.ops import box_iou

    from jdkd.detect.contract import detections
    from jdkd.train.inputs import images_on

    model = unwrapped(module_of(model, "teacher"))
    found = objects = 0
    with mode(model, training=False):
        for batch in batches:
            if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], list | tuple)):
                raise InputError(
                    f"a batch is {batch!r:.60}; give (images, targets) to see what a teacher finds in them"
                )
            images, targets = images_on(model, batch), batch[1]
            for detected, target in zip(detections(model, images), targets, strict=True):
                boxes = target["boxes"].to(detected["boxes"])
                objects += len(boxes)
                if len(boxes) and len(detected["boxes"]):
                    found += int((box_iou(boxes, detected["boxes"]).amax(dim=1) >= OVERLAP).sum())  # of [M, D]
    return Recall(found, objects)


def say_if_blind(teacher: nn.Module, batches: Iterable[Any]) -> None:
    """Says once that a teacher finds none of the objects, as one does that was not loaded or sees the wrong images.

    Args:
        teacher, batches: see :func:`recall_of`.
    """
    recall = recall_of(teacher, batches)
    if recall.objects and not recall.found:
        say_once(
            f"the teacher ({type(unwrapped(teacher)).__name__}) finds none of {recall.objects} objects in training "
            "images; if it was trained to find such, check its weights and how its images are normalised"
        )
