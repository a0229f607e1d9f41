"""How a detector does image by image, where :mod:`jdkd.train.evaluate` says how it does on all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_area, box_iou

from jdkd.detect.input_size import require_whole
from jdkd.train.evaluate import find, prepare

OVERLAP = 0.5  # IoU from which a detection finds a box, COCO's mAP50
NOTHING_RIGHT = 0.5  # the score that counts where no detection of any score is right
WRONG, IGNORED = -1, -2  # in place of the number of a true box


@dataclass(frozen=True)
class JudgedImage:
    """What a detector finds on one image, beside what there is to find.

    Attributes:
        boxes: ``[M, 4]`` xyxy in pixels, the highest score first.
        labels: ``[M]`` from 1.
        scores: ``[M]``.
        hits: of every detection the number of the true box that it finds, :data:`WRONG` where it finds none, and
            :data:`IGNORED` where it lies in a crowd region of its class, which COCO does not count.
        truths: how many true boxes there are.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    hits: tuple[int, ...]
    truths: int

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """How many true boxes are found and missed, and how many detections are wrong, from a score on."""
        hits = self.hits[: self.above(threshold)]
        found = sum(hit >= 0 for hit in hits)
        return found, self.truths - found, hits.count(WRONG)

    def above(self, threshold: float) -> int:
        """How many detections have this score or a higher one."""
        return int((self.scores >= threshold).sum())

    def f1(self, threshold: float) -> float:
        """The image's F1 from a score on: 1 where all is found and nothing else; so too where there is nothing."""
        return f1(*self.counts(threshold))


def f1(found: int, missed: int, wrong: int) -> float:
    """Harmonic mean of precision and recall; 1 where there is nothing to find and nothing is found."""
    total = 2 * found + missed + wrong
    return 2 * found / total if total else 1.0


def judged_images(
    model: nn.Module,
    dataset: Any,
    *,
    device: torch.device | str,
    batch_size: int = 8,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[JudgedImage]:
    """What a detector finds on every image of a dataset, in order.

    Args:
        model, dataset, device, batch_size, workers, progress: as of :func:`jdkd.train.evaluate`.

    Raises:
        InputError: as there.
    """
    require_whole({"batch_size": batch_size})
    prepare(model, dataset)
    how = {"device": device, "batch_size": batch_size, "workers": workers, "progress": progress}
    findings = find(model, dataset, masks=False, **how)
    labels = {category: label for label, category in enumerate(dataset.label_to_category)}
    rows, crowds = _by_image(findings.close()), _by_image(_crowds(dataset))
    judged = []
    for target in map(dataset.target, range(len(dataset))):
        found, regions = (_columns(rows_of[target["image_id"]], labels) for rows_of in (rows, crowds))
        judged.append(judge(*found, target, regions[:2]))
    return judged


def judge(
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    target: Mapping[str, Tensor],
    crowds: tuple[Tensor, Tensor] | None = None,
) -> JudgedImage:
    """Compares detections with what there is to find, as COCO does at an IoU of 0.5.

    From the highest score on, a detection finds the true box of its class that it overlaps most, of those that are left
    and that it overlaps by an IoU of 0.5 at least.

    Args:
        boxes: ``[M, 4]`` xyxy in pixels.
        labels: ``[M]``.
        scores: ``[M]``.
        target: true ``boxes`` [T, 4] and ``labels`` [T].
        crowds: boxes ``[K, 4]`` and labels ``[K]`` of regions whose objects nobody has counted.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels, scores = boxes[order], labels[order], scores[order]
    same = labels[:, None] == target["labels"][None]
    overlaps = (box_iou(boxes, target["boxes"].to(boxes)) * same).tolist()  # [M, T]
    inside = [False] * len(boxes) if crowds is None else _inside(boxes, labels, *crowds)
    free, hits = set(range(len(target["labels"]))), []
    for number, own in enumerate(overlaps):
        match = max(sorted(free), key=own.__getitem__, default=None)
        if match is not None and own[match] >= OVERLAP:
            free.discard(match)
            hits.append(match)
        else:
            hits.append(IGNORED if inside[number] else WRONG)
    return JudgedImage(boxes, labels, scores, tuple(hits), len(target["labels"]))


def best_threshold(images: Sequence[JudgedImage]) -> float:
    """The score from which detections give the best F1 over all images together; where none is right, 0.5."""
    scores = [(score, hit) for one in images for score, hit in zip(one.scores.tolist(), one.hits, strict=True)]
    scores = sorted((each for each in scores if each[1] != IGNORED), reverse=True)
    truths = sum(one.truths for one in images)
    best, threshold, found = 0.0, NOTHING_RIGHT, 0
    for count, (score, hit) in enumerate(scores, start=1):
        found += hit >= 0
        if count < len(scores) and scores[count][0] == score:
            continue
        if (own := f1(found, truths - found, count - found)) > best:
            best, threshold = own, score
    return threshold


def worst_first(images: Sequence[JudgedImage], threshold: float) -> list[int]:
    """Places of the images, those of the lowest F1 first; of equals, those with more errors, then the earlier ones."""

    def rank(place: int) -> tuple[float, int, int]:
        found, missed, wrong = images[place].counts(threshold)
        return f1(found, missed, wrong), -(missed + wrong), place

    return sorted(range(len(images)), key=rank)


def _inside(boxes: Tensor, labels: Tensor, regions: Tensor, kinds: Tensor) -> list[bool]:
    """Whether half of a box or more lies in a region of its class."""
    if not len(regions):
        return [False] * len(boxes)
    first = torch.maximum(boxes[:, None, :2], regions[None, :, :2])  # [M, K, 2]
    last = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    shared = (last - first).clamp(min=0).prod(2)  # [M, K]
    enough = shared >= OVERLAP * box_area(boxes)[:, None]
    return (enough & (labels[:, None] == kinds[None])).any(1).tolist()


def _columns(rows: Sequence[Mapping[str, Any]], labels: Mapping[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes ``[M, 4]`` xyxy, labels ``[M]`` and scores ``[M]`` of rows in COCO's format."""
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
    boxes = torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1)
    kinds = torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.long)
    return boxes, kinds, torch.tensor([row.get("score", 1.0) for row in rows], dtype=torch.float64)


def _by_image(rows: Sequence[Mapping[str, Any]]) -> defaultdict[int, list[Mapping[str, Any]]]:
    found: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["image_id"]].append(row)
    return found


def _crowds(dataset: Any) -> list[Mapping[str, Any]]:
    """The regions of the ground truth whose objects nobody has counted."""
    return [row for row in dataset.coco.dataset["annotations"] if row["iscrowd"]]
