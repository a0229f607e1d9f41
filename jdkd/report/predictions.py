"""See :func:`predictions_section`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jdkd.data import CocoDetectionDataset
from jdkd.data.splits import Split
from jdkd.detect import load
from jdkd.detect.contract import detections
from jdkd.errors import InputError
from jdkd.report.outcome import Outcome
from jdkd.report.pictures import Box, Panel, detected, picture_row, truth_panel
from jdkd.train.image_scores import OVERLAP, judge

SHOWN = 6  # images


def predictions_section(outcome: Outcome) -> str:
    """What base and students see on a few of the images that report, beside what there is to see.

    The images are those that `result.json` names under `report.examples`; of n true boxes on an image, the n most
    confident detections are drawn.

    Args:
        outcome: of a finished search whose data and base still lie where they lay.

    Returns:
        HTML; empty where the result names no images, and a sentence where they cannot be shown.
    """
    part, where = outcome.result.get("report"), outcome.run.get("where") or {}
    names = part.get("examples") if isinstance(part, dict) else None
    if not names or not outcome.students:
        return ""
    try:
        dataset = examples(part, names)
        images, targets = zip(*dataset, strict=True)
        folders = {one.candidate: one.folder for one in outcome.students}
        models = {"base": Path(where.get("base", ""))}
        models |= {title: folders[id_] for id_, title in outcome.chosen.items()}
        seen = {title: _seen(folder, images, targets, dataset.classes) for title, folder in models.items()}
    except InputError as error:
        return f'<p class="faint">Not shown: {escape(str(error))}</p>'
    figures = []
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        panels = [truth_panel(target, dataset.classes)]
        for title, found in seen.items():
            hits = sum(box.kind == "found" for box in found[number])
            panels.append(Panel(title, found[number], f"{hits} of {len(target['labels'])} found"))
        figures.append(picture_row(image, panels, f"example-{number}", f"image {number + 1}"))
    rule = (
        "Of n true boxes, the n most confident detections are drawn: solid where class and place are right (IoU from "
        f"{OVERLAP:g}), dashed where not. The images are the first of those that report, not chosen by how they come "
        "out."
    )
    return f'<p class="faint">{rule}</p>{"".join(figures)}'


def examples(part: Mapping[str, Any], names: Sequence[str]) -> CocoDetectionDataset:
    """The first images of these file names, of those that report.

    Raises:
        InputError: they are not there any more.
    """
    dataset = CocoDetectionDataset(Split(Path(part["image_folder"]), Path(part["annotations"])))
    known = {name: index for index, (name, _, _) in enumerate(dataset.sizes)}
    return dataset.subset(known[name] for name in names[:SHOWN] if name in known)


def _seen(
    folder: Path, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> list[list[Box]]:
    """What the detector in a folder finds on images, one list of boxes each."""
    model = load(folder)
    with torch.inference_mode():
        found = detections(model, [image.float() / 255 for image in images])
    return [_judged(one, target, classes) for one, target in zip(found, targets, strict=True)]


def _judged(found: Mapping[str, Tensor], target: Mapping[str, Tensor], classes: Sequence[str]) -> list[Box]:
    """The most confident detections, as many as there are true boxes; each true box is found at most once."""
    known = judge(*(found[name].cpu() for name in ("boxes", "labels", "scores")), target)
    return detected(known, classes)[: len(target["labels"])]
