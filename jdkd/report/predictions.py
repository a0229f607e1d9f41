"""See :func:`predictions_section`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from jdkd.report.svg import drawing, tag

SHOWN = 6  # images
SIDE = 320  # pixels of the longer side of a picture on the page
OVERLAP = 0.5  # IoU from which a detection counts as found, COCO's mAP50


@dataclass(frozen=True)
class Box:
    """A box on an image.

    Args:
        corners: left, top, right, bottom in pixels.
        label: name of its class, and of a detection its score.
        kind: `truth`, or of a detection `found` or `wrong`.
    """

    corners: tuple[float, float, float, float]
    label: str
    kind: str


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
        dataset = _examples(part, names[:SHOWN])
        images, targets = zip(*dataset, strict=True)
        folders = {one.candidate: one.folder for one in outcome.students}
        models = {"base": Path(where.get("base", ""))}
        models |= {title: folders[id_] for id_, title in outcome.chosen.items()}
        seen = {title: _seen(folder, images, targets, dataset.classes) for title, folder in models.items()}
    except InputError as error:
        return f'<p class="faint">Not shown: {escape(str(error))}</p>'
    truth = [[*map(Box, _corners(t), _names(t, dataset.classes), ["truth"] * len(t["labels"]))] for t in targets]
    figures = []
    for number, image in enumerate(images):
        boxes = {"truth": truth[number]} | {title: found[number] for title, found in seen.items()}
        figures.append(_row(number, image, boxes))
    rule = (
        "Of n true boxes, the n most confident detections are drawn: solid where class and place are right (IoU from "
        f"{OVERLAP:g}), dashed where not. The images are the first of those that report, not chosen by how they come "
        "out."
    )
    return f'<p class="faint">{rule}</p>{"".join(figures)}'


def _examples(part: Mapping[str, Any], names: Sequence[str]) -> CocoDetectionDataset:
    """The images of these file names.

    Raises:
        InputError: they are not there any more.
    """
    dataset = CocoDetectionDataset(Split(Path(part["image_folder"]), Path(part["annotations"])))
    known = {name: index for index, (name, _, _) in enumerate(dataset.sizes)}
    return dataset.subset(known[name] for name in names if name in known)


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
    from torchvision.ops import box_iou

    best = found["scores"].argsort(descending=True)[: len(target["labels"])]
    chosen = {name: found[name][best].cpu() for name in ("boxes", "labels", "scores")}
    overlaps = box_iou(chosen["boxes"].float(), target["boxes"].float())  # [M, T]
    overlaps = overlaps * (chosen["labels"][:, None] == target["labels"][None])
    boxes, free = [], set(range(len(target["labels"])))
    for number, (corners, name) in enumerate(zip(_corners(chosen), _names(chosen, classes), strict=True)):
        match = max(free, key=lambda k: overlaps[number, k].item(), default=None)
        hit = match is not None and overlaps[number, match].item() >= OVERLAP
        free -= {match} if hit else set()
        label = f"{name} {chosen['scores'][number].item():.2f}"
        boxes.append(Box(corners, label, "found" if hit else "wrong"))
    return boxes


def _corners(boxes: Mapping[str, Tensor]) -> list[tuple[float, ...]]:
    return [tuple(corners) for corners in boxes["boxes"].tolist()]


def _names(boxes: Mapping[str, Tensor], classes: Sequence[str]) -> list[str]:
    return [classes[k - 1] if 0 < k <= len(classes) else str(k) for k in boxes["labels"].tolist()]


def _row(number: int, image: Tensor, boxes: Mapping[str, Sequence[Box]]) -> str:
    """One image once per network: the picture is on the page once, and used again."""
    height, width = image.shape[1:]
    panels = []
    for title, own in boxes.items():
        place = f"example-{number}"
        if not panels:
            shown = tag("image", href=_jpeg(image), width=width, height=height, id=place, preserveAspectRatio="none")
        else:
            shown = tag("use", href=f"#{place}")
        drawn = shown + "".join(_box(box, max(height, width)) for box in own)
        hits = sum(box.kind == "found" for box in own)
        count = f"{len(own)} boxes" if title == "truth" else f"{hits} of {len(boxes['truth'])} found"
        picture = drawing((width, height), drawn, f"image {number + 1}: {title}")
        panels.append(f"<figure>{picture}<figcaption>{escape(title)}: {count}</figcaption></figure>")
    return f'<div class="examples">{"".join(panels)}</div>'


def _box(box: Box, side: int) -> str:
    left, top, right, bottom = box.corners
    size = side / 24
    place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    words = tag(
        "text", box.label, x=left + size / 6, y=max(top - size / 5, 0.85 * size), style=f"font-size: {size:.1f}px"
    )
    return tag("g", None, tag("rect", **place, class_="halo"), tag("rect", **place), words, class_=f"box {box.kind}")


def _jpeg(image: Tensor) -> str:
    """A picture as a data address of some 10 kB."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
