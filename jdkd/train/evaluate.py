"""COCO average precision of a detector, by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from jdkd.detect import fix_roi_scales
from jdkd.errors import InputError
from jdkd.train.modes import mode


@dataclass(frozen=True)
class Scores:
    """COCO's twelve numbers; -1 stands, as pycocotools has it, where there is no ground truth to score.

    Attributes:
        map: average precision over IoU 0.50:0.95, all areas, 100 detections an image.
        map50, map75: the same at IoU 0.50 and at 0.75.
        stats: all twelve, in pycocotools' order.
        lines: pycocotools' own twelve lines.
    """

    map: float
    map50: float
    map75: float
    stats: list[float]
    lines: str


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    device: torch.device | str,
    batch_size: int = 8,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores a detector on every image of a dataset, those without annotations included.

    Args:
        model: the detector; moved to ``device``, its modules keep their mode.
        dataset: a :class:`jdkd.data.coco.CocoDetectionDataset`; its ``coco`` is the ground truth.
        device: where to run.
        batch_size: images per forward.
        workers: processes that read images.
        progress: told how many of how many images are done.

    Returns:
        The scores; a detector that finds nothing has a ``map`` of 0.

    Raises:
        InputError: the detector's classes are not the dataset's.
    """
    _require_same_classes(model, dataset.classes)
    fix_roi_scales(model)
    found: list[dict[str, Any]] = []
    done = 0
    with mode(model.to(device), training=False), torch.inference_mode():
        for images, image_ids in _batches(dataset, batch_size, workers):
            detections = model([image.to(device).float() / 255 for image in images])
            for image_id, detection in zip(image_ids, detections, strict=True):
                found += _as_results(image_id, detection, dataset.label_to_category)
            done += len(images)
            if progress:
                progress(done, len(dataset))
    return _score(dataset, found)


def _batches(dataset: Any, batch_size: int, workers: int) -> Iterator[tuple[tuple[Tensor, ...], list[int]]]:
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_unstacked,
        generator=torch.Generator(),  # leaves the caller's generator alone
    )
    for items in loader:
        images, targets = zip(*items, strict=True)
        yield images, [target["image_id"] for target in targets]


def _unstacked(items: list[Any]) -> list[Any]:
    return items


def _as_results(image_id: int, detection: dict[str, Tensor], categories: list[int]) -> list[dict[str, Any]]:
    boxes = detection["boxes"].float().cpu()  # [M, 4] xyxy
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)  # [M, 4] x, y, width, height
    rows = zip(boxes.tolist(), detection["labels"].tolist(), detection["scores"].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
        for box, label, score in rows
    ]


def _score(dataset: Any, found: list[dict[str, Any]]) -> Scores:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset.coco
        if found:
            results = truth.loadRes(found)
        else:  # loadRes cannot take an empty list
            results = COCO()
            results.dataset = {**truth.dataset, "annotations": []}
            results.createIndex()
        scoring = COCOeval(truth, results, "bbox")
        scoring.params.imgIds = sorted(dataset.image_ids)
        scoring.evaluate()
        scoring.accumulate()
        with contextlib.redirect_stdout(printed):
            scoring.summarize()
    stats = [float(value) for value in scoring.stats]
    return Scores(*stats[:3], stats, printed.getvalue().rstrip("\n"))


def _require_same_classes(model: nn.Module, classes: tuple[str, ...]) -> None:
    """Refuses a detector that was made for other classes, or for the same ones in another order."""
    spec = getattr(model, "spec", None)
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if spec is not None:
        known = len(spec.classes)
    elif hasattr(predictor, "cls_score"):
        known = predictor.cls_score.out_features - 1  # label 0 is the background
    else:
        return
    if known != len(classes):
        raise InputError(
            f"the detector knows {known} classes and the dataset has {len(classes)}; evaluate it on the data "
            "it was made for, or train one for this data."
        )
    if spec is not None and spec.classes != tuple(classes) and sorted(spec.classes) == sorted(classes):
        raise InputError(
            f"the detector has its classes in the order {', '.join(spec.classes)} and the dataset in the "
            f"order {', '.join(classes)}; number the categories of the annotations as the detector does."
        )
