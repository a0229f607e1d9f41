"""Images with boxes on them: what there is to see, and beside it what detectors see."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from torch import Tensor

from jdkd.report.svg import drawing, tag
from jdkd.train.image_scores import IGNORED, WRONG, JudgedImage

SIDE = 320  # pixels of the longer side of a picture on the page


@dataclass(frozen=True)
class Box:
    """A box on an image.

    Args:
        corners: left, top, right, bottom in pixels.
        label: name of its class, and of a detection its score; empty where nothing is written.
        kind: `truth`, of a detection `found`, `wrong` or `ignored`, and `missed` of a true box that no detection finds.
    """

    corners: tuple[float, float, float, float]
    label: str
    kind: str


@dataclass(frozen=True)
class Panel:
    """One view of an image.

    Args:
        title: whose view.
        boxes: what is drawn on it.
        caption: what stands below, behind the title.
    """

    title: str
    boxes: Sequence[Box]
    caption: str


def truth_panel(target: Mapping[str, Tensor], classes: Sequence[str]) -> Panel:
    """What there is to see: true ``boxes`` [T, 4] and ``labels`` [T]."""
    count = len(target["labels"])
    return Panel("truth", _boxes(target, classes, ["truth"] * count), f"{count} box{'es' * (count != 1)}")


def detected(judged: JudgedImage, classes: Sequence[str]) -> list[Box]:
    """What a detector finds on an image, the highest score first."""
    kinds = [{WRONG: "wrong", IGNORED: "ignored"}.get(hit, "found") for hit in judged.hits]
    boxes = _boxes({"boxes": judged.boxes, "labels": judged.labels}, classes, kinds)
    scores = judged.scores.tolist()
    return [replace(box, label=f"{box.label} {score:.2f}") for box, score in zip(boxes, scores, strict=True)]


def missed(judged: JudgedImage, target: Mapping[str, Tensor], threshold: float) -> list[Box]:
    """The true boxes that no detection of this score finds."""
    found = set(judged.hits[: judged.above(threshold)])
    boxes = target["boxes"].tolist()
    return [Box(tuple(corners), "", "missed") for number, corners in enumerate(boxes) if number not in found]


def _boxes(boxes: Mapping[str, Tensor], classes: Sequence[str], kinds: Sequence[str]) -> list[Box]:
    labels = boxes["labels"].tolist()
    names = [classes[k - 1] if 0 < k <= len(classes) else str(k) for k in labels]
    return [Box(tuple(corners), *each) for corners, *each in zip(boxes["boxes"].tolist(), names, kinds, strict=True)]


def picture_row(image: Tensor, panels: Sequence[Panel], place: str, said: str) -> str:
    """One image once per view: the picture is on the page once, and used again.

    Args:
        image: ``[3, H, W]`` uint8.
        panels: the views of it.
        place: its id on the page, which no other has.
        said: what it is, for who cannot see it.
    """
    height, width = image.shape[1:]
    drawn = []
    for number, panel in enumerate(panels):
        if number == 0:
            shown = tag("image", href=jpeg(image), width=width, height=height, id=place, preserveAspectRatio="none")
        else:
            shown = tag("use", href=f"#{place}")
        shown += "".join(box_mark(box, max(height, width)) for box in panel.boxes)
        picture = drawing((width, height), shown, f"{said}: {panel.title}")
        words = f"{panel.title}: {panel.caption}"
        drawn.append(f"<figure>{picture}<figcaption>{escape(words)}</figcaption></figure>")
    return f'<div class="examples">{"".join(drawn)}</div>'


def box_mark(box: Box, side: int) -> str:
    """A box with its words, on an image whose longer side is so many pixels."""
    left, top, right, bottom = box.corners
    size = side / 24
    place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    at = {"x": left + size / 6, "y": max(top - size / 5, 0.85 * size), "style": f"font-size: {size:.1f}px"}
    words = tag("text", box.label, **at) if box.label else ""
    return tag("g", None, tag("rect", **place, class_="halo"), tag("rect", **place), words, class_=f"box {box.kind}")


def jpeg(image: Tensor) -> str:
    """A picture ``[3, H, W]`` uint8 as a data address of some 10 kB."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    return data_address(picture, "jpeg", quality=82)


def data_address(picture: Any, kind: str, **how: Any) -> str:
    """A picture of Pillow's as a data address, of kind ``jpeg`` or ``png``."""
    stream = io.BytesIO()
    picture.save(stream, kind.upper(), **how)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
