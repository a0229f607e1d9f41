"""See :func:`score`."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdkd.notices import say_once
from jdkd.train.twelve import AREAS, mean_of, twelve

COCO_DETECTIONS = 100  # an image, where nothing else is said


@dataclass(frozen=True)
class ClassScores:
    """What one class scores, over all areas; -1 where no object of it is to be found.

    Attributes:
        name: of the class.
        objects: how many are to be found; crowd regions are not.
        map: average precision over IoU 0.50:0.95.
        map50, map75: the same at IoU 0.50 and at 0.75.
    """

    name: str
    objects: int
    map: float
    map50: float
    map75: float


@dataclass(frozen=True)
class Scores:
    """COCO's twelve numbers; -1 stands, as pycocotools has it, where there is no ground truth to score.

    Attributes:
        map: average precision over IoU 0.50:0.95, all areas.
        map50, map75: the same at IoU 0.50 and at 0.75.
        stats: all twelve, in pycocotools' order.
        lines: the twelve lines that pycocotools prints.
        max_detections: how many detections an image were scored.
        segm: the same of the masks, where the detector gives them and the data have segmentations; else None.
        per_class: the same of each class, in order of label.
    """

    map: float
    map50: float
    map75: float
    stats: list[float]
    lines: str
    max_detections: int = COCO_DETECTIONS
    segm: "Scores | None" = None
    per_class: tuple[ClassScores, ...] = ()

    @property
    def numbers(self) -> dict[str, Any]:
        """map, map50, map75, stats and per_class, and those of masks under segm where they were scored; JSON-able."""
        own = {name: getattr(self, name) for name in ("map", "map50", "map75", "stats")}
        own["per_class"] = [dict(vars(each)) for each in self.per_class]
        return own if self.segm is None else {**own, "segm": self.segm.numbers}

    @property
    def text(self) -> str:
        """The lines of boxes, those of masks where they were scored, and the table of the classes."""
        parts = [self.lines] if self.segm is None else [f"boxes:\n{self.lines}\nmasks:\n{self.segm.lines}"]
        return "\n".join(parts + ([self.table] if self.per_class else []))

    @property
    def table(self) -> str:
        """A line a class: objects, the three scores of boxes, and those of masks where they were scored."""
        kinds = [("", self)] if self.segm is None else [("box ", self), ("mask ", self.segm)]
        titles = ["class", "objects", *(f"{kind}{name}" for kind, _ in kinds for name in ("mAP", "mAP50", "mAP75"))]
        rows = [titles]
        for place, each in enumerate(self.per_class):
            scored = [scores.per_class[place] for _, scores in kinds]
            rows.append(
                [each.name, f"{each.objects:,}"]
                + [f"{value:.3f}" if value >= 0 else "-" for one in scored for value in (one.map, one.map50, one.map75)]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def score(dataset: Any, found: Sequence[dict[str, Any]], most: int, of: str = "bbox") -> Scores:
    """COCO average precision of detections, by faster-coco-eval.

    Args:
        dataset: a :class:`jdkd.data.coco.CocoDetectionDataset`; its ``coco`` is the ground truth.
        found: detections in COCO's result format, of the data set's images.
        most: how many detections an image are scored, those of the highest scores.
        of: ``"bbox"``, or ``"segm"`` for the masks of data with masks.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset.coco
        if of == "segm" and min(dataset.image_ids) < 0:  # of such images faster-coco-eval takes boxes, but no masks
            truth, found = _from_zero(truth, found)
    results = COCO()
    results.dataset = {**truth.dataset, "annotations": list(_numbered(found, of))}
    results.createIndex()
    scoring = COCOeval_faster(truth, results, of)
    scoring.params.imgIds = sorted(truth.imgs)
    scoring.params.maxDets = [min(1, most), min(10, most), most]
    scoring.evaluate()
    scoring.accumulate()
    stats, lines = twelve(scoring)
    if stats[0] == -1:
        say_once(
            f"none of the {len(dataset)} images has a box to detect, so there is nothing to score and every number is "
            "-1; choose images with boxes"
        )
    return Scores(stats[0], stats[1], stats[2], stats, lines, most, per_class=_per_class(scoring, dataset))


def _from_zero(truth: Any, found: Sequence[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """Ground truth and detections of the same images, which are numbered from 0 on."""
    numbers = {number: place for place, number in enumerate(sorted(truth.imgs))}
    counted = type(truth)()
    images = [{**image, "id": numbers[image["id"]]} for image in truth.dataset["images"]]
    objects, found = (
        [{**row, "image_id": numbers[row["image_id"]]} for row in rows] for rows in (truth.anns.values(), found)
    )
    counted.dataset = {**truth.dataset, "images": images, "annotations": objects}
    counted.createIndex()
    return counted, found


def _numbered(found: Sequence[dict[str, Any]], of: str) -> Any:
    """Detections as annotations: with an id from 1 on, and the area by which COCO calls them small or large."""
    from pycocotools import mask

    for number, row in enumerate(found, 1):
        area = float(mask.area(row["segmentation"])) if of == "segm" else row["bbox"][2] * row["bbox"][3]
        yield {**row, "id": number, "area": area, "iscrowd": 0}


def _per_class(scoring: Any, dataset: Any) -> tuple[ClassScores, ...]:
    """What each class of the data scores."""
    precision = scoring.eval["precision"][..., AREAS.index("all"), -1]  # [T, R, K]
    labels = np.concatenate(dataset.labels) if len(dataset) else np.zeros(0, dtype=np.int64)
    objects = np.bincount(labels, minlength=len(dataset.classes) + 1)[1:]
    thresholds = scoring.params.iouThrs
    return tuple(
        ClassScores(
            name, int(objects[place]), *(mean_of(precision[..., place], thresholds, iou) for iou in (None, 0.5, 0.75))
        )
        for place, name in enumerate(dataset.classes)
    )
