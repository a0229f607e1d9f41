"""See :func:`twelve`."""

from typing import Any

AREAS = ("all", "small", "medium", "large")
ROWS = (  # of precision or recall, at which IoU, for which area, at which of the three numbers of detections
    ("precision", None, "all", 2),
    ("precision", 0.5, "all", 2),
    ("precision", 0.75, "all", 2),
    *(("precision", None, area, 2) for area in AREAS[1:]),
    *(("recall", None, "all", most) for most in range(3)),
    *(("recall", None, area, 2) for area in AREAS[1:]),
)
NAMES = {"precision": "Average Precision  (AP)", "recall": "Average Recall     (AR)"}


def twelve(scoring: Any) -> tuple[list[float], str]:
    """COCO's twelve numbers and lines for any number of detections an image.

    pycocotools' own ``summarize`` looks for 100 of them in its first line, and gives -1 where another number was
    scored.

    Args:
        scoring: a ``COCOeval`` that has accumulated, with three numbers in ``params.maxDets``.

    Returns:
        The numbers in pycocotools' order, -1 where there is nothing to score, and its lines.
    """
    thresholds = scoring.params.iouThrs  # [T]
    stats, lines = [], []
    for what, iou, area, number in ROWS:
        values = scoring.eval[what][..., AREAS.index(area), number]  # [T, R, K] or [T, K]
        stats.append(mean_of(values, thresholds, iou))
        span = f"{thresholds[0]:.2f}:{thresholds[-1]:.2f}" if iou is None else f"{iou:.2f}"
        most = scoring.params.maxDets[number]
        lines.append(f" {NAMES[what]} @[ IoU={span:<9} | area={area:>6} | maxDets={most:>3} ] = {stats[-1]:.3f}")
    return stats, "\n".join(lines)


def mean_of(values: Any, thresholds: Any, iou: float | None) -> float:
    """The mean of what there is to score, at one IoU or over all of them; -1 where there is nothing.

    Args:
        values: ``[T, ...]`` precision or recall, -1 where there is no ground truth.
        thresholds: ``[T]`` of the IoU.
        iou: one of them, or None.
    """
    if iou is not None:
        values = values[abs(thresholds - iou) < 1e-6]
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
