"""Intervals of mAP by the bootstrap over images: how much of a difference is the images that happened to be there.

COCO's average precision is a function of which detections are right, image by image. That is found once; then images
are drawn with replacement and each is counted as often as it was drawn (Efron and Tibshirani, 1993, chapter 6).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST = 100  # detections an image that are scored
RESAMPLES = 400


@dataclass(frozen=True)
class _Class:
    """What is known of one class, its detections from the best score down.

    Args:
        objects: to be found, by image.
        images: the image of each detection.
        right, counted: at each threshold and of each detection: it matches an object; it is right or wrong at all.
    """

    objects: np.ndarray  # [images]
    images: np.ndarray  # [D]
    right: np.ndarray  # [T, D]
    counted: np.ndarray  # [T, D]


class Judged:
    """The detections of one detector on a data set, judged.

    Args:
        dataset: a :class:`jdkd.data.CocoDetectionDataset`.
        found: detections in COCO's result format.
    """

    def __init__(self, dataset: Any, found: Sequence[dict[str, Any]]) -> None:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            truth = dataset.coco
            results = truth.loadRes(list(found)) if found else COCO()
            scoring = COCOeval(truth, results, "bbox")
            scoring.params.imgIds = sorted(dataset.image_ids)
            scoring.params.areaRng = scoring.params.areaRng[:1]  # of all sizes
            scoring.params.maxDets = [MOST]
            scoring.evaluate()
        self.count = count = len(scoring.params.imgIds)
        self._recalls = scoring.params.recThrs
        rows = scoring.evalImgs
        self._classes = [
            _judged(rows[start : start + count], len(scoring.params.iouThrs)) for start in range(0, len(rows), count)
        ]

    def map(self, times: np.ndarray | None = None) -> float:
        """mAP where each image counts as often as ``times`` says, ``[images]``; by default once."""
        times = np.ones(self.count, dtype=int) if times is None else times
        scores = [self._precision(each, times) for each in self._classes if (each.objects * times).sum()]
        return float(np.mean(scores)) if scores else -1.0

    def _precision(self, known: _Class, times: np.ndarray) -> float:
        objects = (known.objects * times).sum()
        weights = known.counted * times[known.images]  # [T, D]
        right = np.cumsum(weights * known.right, axis=1)
        seen = np.cumsum(weights, axis=1)
        precision = right / np.maximum(seen, np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = []
        for recall, envelope in zip(right / objects, precision, strict=True):
            places = np.searchsorted(recall, self._recalls, side="left")
            found.append(np.append(envelope, 0.0)[np.minimum(places, len(envelope))])
        return float(np.mean(found))


def _judged(rows: Sequence[dict[str, Any] | None], thresholds: int) -> _Class:
    """One class on all images, in their order."""
    objects = np.array([0 if row is None else int((~np.array(row["gtIgnore"], dtype=bool)).sum()) for row in rows])
    some = [(place, row) for place, row in enumerate(rows) if row is not None and row["dtScores"]]
    if not some:
        nothing = np.zeros((thresholds, 0))
        return _Class(objects, np.zeros(0, dtype=int), nothing, nothing)
    scores = np.concatenate([row["dtScores"] for _, row in some])
    order = np.argsort(-scores, kind="mergesort")
    images = np.concatenate([np.full(len(row["dtScores"]), place) for place, row in some])[order]
    matched = np.concatenate([row["dtMatches"] for _, row in some], axis=1)[:, order] > 0
    ignored = np.concatenate([row["dtIgnore"] for _, row in some], axis=1)[:, order].astype(bool)
    return _Class(objects, images, matched & ~ignored, (~ignored).astype(int))


def draws(images: int, count: int) -> np.ndarray:
    """How often each image is drawn in each of ``count`` resamples, ``[count, images]``; always the same ones."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=count)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of resampled values, 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def gain(ours: Sequence[Judged], theirs: Sequence[Judged]) -> dict[str, Any]:
    """What one way scores more than another on average, with its interval over seeds and images.

    Args:
        ours, theirs: judged detectors, seed by seed, on the same images.
    """
    rng, values = np.random.default_rng(0), []
    for times in draws(ours[0].count, RESAMPLES):
        drawn = rng.integers(len(ours), size=len(ours))
        values.append(np.mean([ours[seed].map(times) - theirs[seed].map(times) for seed in drawn]))
    mean = float(np.mean([a.map() - b.map() for a, b in zip(ours, theirs, strict=True)]))
    return {"gain": mean, "gain_interval": list(interval(values))}


def gained(found: dict[str, Any]) -> str:
    """What :func:`gain` found, in a cell."""
    low, high = found["gain_interval"]
    return f"{found['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
