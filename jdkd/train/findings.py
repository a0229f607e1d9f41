"""See :class:`Findings`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jdkd.errors import InputError, ModelError
from jdkd.notices import say_once


class Findings:
    """Detections of many images in COCO's result format, without those that cannot be scored.

    pycocotools takes a box of NaN for a hit; detections with something that is not finite, and boxes that end before
    they begin, are left out and counted. Masks are kept as run lengths, a pixel being in one from 0.5 on.

    Args:
        kind: what found them, as messages name it.
        categories: category id of each label; index 0 is the background.

    Attributes:
        rows: what was found, ``bbox`` beside ``segmentation`` where masks were kept.
        masks: whether any were.
    """

    def __init__(self, kind: str, categories: list[int]) -> None:
        self.kind, self.categories = kind, categories
        self.rows: list[dict[str, Any]] = []
        self.masks = False
        self._dropped = self._images = 0
        self._first = ""

    def add(self, image_id: int, found: Mapping[str, Tensor], masks: bool = False) -> None:
        """Takes the detections of one image.

        Args:
            image_id: of the ground truth.
            found: ``boxes`` [M, 4] xyxy in pixels, ``labels`` [M] and ``scores`` [M].
            masks: keep ``found["masks"]`` [M, 1, H, W] too.

        Raises:
            InputError: a label is the background's or beyond the classes.
        """
        boxes = found["boxes"].double().reshape(-1, 4).cpu()  # [M, 4] xyxy; double, so that no difference overflows
        labels, scores = found["labels"].long().cpu(), found["scores"].double().cpu()  # [M]
        self._check(image_id, labels)
        usable = boxes.isfinite().all(1) & scores.isfinite() & (boxes[:, 2:] >= boxes[:, :2]).all(1)  # [M]
        if masks and len(labels):  # of nothing found they may be of any shape
            usable &= found["masks"].flatten(1).sum(1, dtype=torch.float32).isfinite().cpu()
        if not usable.all():
            worst = int(usable.logical_not().nonzero()[0, 0])
            box = ", ".join(f"{side:g}" for side in boxes[worst].tolist())
            self._first = self._first or f"image {image_id}: box [{box}], score {scores[worst]:g}"
            self._dropped += int(usable.logical_not().sum())
            self._images += 1
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)  # [M, 4] x, y, width, height
        rows = [
            {"image_id": image_id, "category_id": self.categories[label], "bbox": box, "score": score}
            for box, label, score in zip(
                boxes[usable].tolist(), labels[usable].tolist(), scores[usable].tolist(), strict=True
            )
        ]
        if masks:
            self.masks = True
        if masks and rows:
            for row, lengths in zip(rows, _run_lengths(found["masks"][usable.to(found["masks"].device)]), strict=True):
                row["segmentation"] = lengths
        self.rows += rows

    def merge(self, other: "Findings") -> None:
        """Takes what another, of other images, has found; of the first that cannot be scored it keeps its own."""
        self.rows += other.rows
        self.masks |= other.masks
        self._dropped += other._dropped
        self._images += other._images
        self._first = self._first or other._first

    def close(self) -> list[dict[str, Any]]:
        """Returns the rows, and says how many detections were left out.

        Raises:
            ModelError: all were.
        """
        if self._dropped:
            total, parts = self._dropped + len(self.rows), "boxes or scores"
            if self.masks:
                parts = "boxes, scores or masks"
            what = (
                f"{self._dropped} of the {total} detections of {self.kind} have {parts} that are not finite, "
                f"or boxes that end before they begin, on {self._images} image(s), first on {self._first}"
            )
            if not self.rows:
                raise ModelError(
                    f"{what}: nothing is left to score; look for NaN in its weights and in the running statistics of "
                    "its batch norms (jdkd.train.calibrate_bn measures these anew)"
                )
            say_once(f"{what}; they are left out of the score")
        return self.rows

    def _check(self, image_id: int, labels: Tensor) -> None:
        most = len(self.categories) - 1
        wrong = labels[(labels < 1) | (labels > most)]
        if len(wrong):
            ids = " (it may give category ids)" if set(wrong.tolist()) <= set(self.categories) else ""
            raise InputError(
                f"{self.kind} gives a box of image {image_id} the label {int(wrong[0])}{ids}, and the dataset has the "
                f"labels 1 to {most}, in order of category id, 0 being the background; score it on the data that it "
                "was made for, or wrap it so that it gives these labels"
            )


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's compressed run lengths of masks [M, 1, H, W]."""
    from pycocotools import mask

    columns = (masks[:, 0] > 0.5).mT.to("cpu", torch.uint8).contiguous()  # [M, W, H]
    return mask.encode(columns.numpy().transpose(2, 1, 0)) if len(columns) else []
