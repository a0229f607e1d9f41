"""See :func:`parity`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jdkd.detect.contract import detections
from jdkd.detect.intermediates import intermediates
from jdkd.errors import InputError
from jdkd.export.opening import Exported
from jdkd.export.preparing import Found, batch_of
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.train.evaluate import scored
from jdkd.train.findings import Findings

MAP = 0.001
"""What the mAP of a file may differ by."""


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same detection, of the same class.

    Args:
        iou: of the two boxes, at least.
        score: by which the two scores may differ.
        mask: IoU of the two masks, at least.
        share: of all detections that must have one that is the same.
        stage: by which values on the way may differ, as a share of the largest.
    """

    iou: float
    score: float
    mask: float
    share: float
    stage: float


TOLERANCES = {"fp32": Tolerance(0.99, 0.002, 0.95, 0.99, 0.001), "fp16": Tolerance(0.95, 0.02, 0.9, 0.97, 0.05)}


@dataclass
class Parity:
    """How far a file and its detector agree.

    Attributes:
        images: that both have looked at.
        same, other: detections, of either, that the other one has, and has not.
        box, score, mask: the most that those which both have differ by, in pixels, in score, in IoU below 1.
        maps: of boxes and of masks, of the detector and of the file, where there was data to score on.
        first: the first image on which they part.
    """

    images: int = 0
    same: int = 0
    other: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    maps: dict[str, tuple[float, ...]] = field(default_factory=dict)
    first: Tensor | None = None

    def compare(self, ours: Found, theirs: Found, tolerance: Tolerance, cut: Callable[[Found, Found], float]) -> bool:
        """Counts the detections of one image.

        Args:
            ours, theirs: what the two find.
            tolerance: what counts as the same.
            cut: ``cut(mine, its)``, the score up to which one of the first may be missing from the second.

        Returns:
            Whether any parts.
        """
        pairs = _pairs(ours, theirs, tolerance)
        for one, other in pairs:
            self.box = max(self.box, float(np.abs(ours["boxes"][one] - theirs["boxes"][other]).max()))
            self.score = max(self.score, float(abs(ours["scores"][one] - theirs["scores"][other])))
            if "masks" in ours:
                self.mask = max(self.mask, 1 - _mask_iou(ours["masks"][one], theirs["masks"][other]))
        alone = [
            1
            for place, mine, its in ((0, ours, theirs), (1, theirs, ours))
            for number in {*range(len(mine["scores"]))} - {pair[place] for pair in pairs}
            if mine["scores"][number] > cut(mine, its) + tolerance.score
        ]
        self.images, self.same, self.other = self.images + 1, self.same + 2 * len(pairs), self.other + len(alone)
        return bool(alone)

    def sentence(self) -> str:
        """What it comes to."""
        share = self.same / max(1, self.same + self.other)
        masks = f", masks by an IoU of {1 - self.mask:.3f}" if self.mask else ""
        maps = "".join(
            f"; mAP of {kind} {ours:.4f} eager, {theirs:.4f} exported" for kind, (ours, theirs) in self.maps.items()
        )
        return (
            f"{share:.2%} of {self.same + self.other:,} detections on {self.images} image(s) agree, boxes within "
            f"{self.box:.2g} px, scores within {self.score:.2g}{masks}{maps or '; no data to score mAP on'}"
        )

    def complaint(self, tolerance: Tolerance) -> str | None:
        """What is too far apart."""
        if not self.same + self.other:
            return (
                "the detector finds nothing on these images, so there is nothing to compare; give --data in which it "
                "finds something, or train it"
            )
        if self.same < tolerance.share * (self.same + self.other):
            return f"only {self.sentence()}, and {tolerance.share:.0%} must agree"
        for kind, (ours, theirs) in self.maps.items():
            if abs(ours - theirs) > MAP:
                return f"the mAP of {kind} is {ours:.4f} eager and {theirs:.4f} exported, more than {MAP} apart"
        return None


def parity(
    model: nn.Module,
    file: Exported,
    images: Iterable[tuple[Tensor, Mapping[str, Any]]],
    dataset: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Compares what a detector and its exported file find.

    Detections are matched by class and IoU. One whose score is as low as the lowest that the other keeps, or the
    threshold, counts for nothing where it has no partner.

    Args:
        model: the detector, in eager mode; run on the CPU.
        file: it, exported.
        images: ``[3, H, W]`` uint8, with their targets.
        dataset: the :class:`jdkd.data.CocoDetectionDataset` of just these images, to score both on; None scores none.
        progress: called with images done and images.
    """
    found = Parity()
    tolerance, facts = TOLERANCES[file.facts["dtype"]], file.facts
    total = len(dataset) if dataset is not None else 0
    kinds = ("the detector", "the exported file") if dataset is not None else ()
    findings = {kind: Findings(kind, dataset.label_to_category) for kind in kinds}
    segmented = dataset is not None and dataset.segmented

    def cut(mine: Found, its: Found) -> float:
        full = len(its["scores"]) >= facts["detections"]
        return max(facts["score_threshold"], float(its["scores"].min()) if full else 0.0)

    with mode(model, training=False), torch.inference_mode():
        for number, (image, target) in enumerate(images, 1):
            (ours,) = (numbers(each) for each in detections(model, [image.float() / 255]))
            (theirs,) = file([image.permute(1, 2, 0).numpy()])
            if found.compare(ours, theirs, tolerance, cut) and found.first is None:
                found.first = image
            for findings_of, each in zip(findings.values(), (ours, theirs), strict=False):
                masks = segmented and "masks" in each
                findings_of.add(target["image_id"], _tensors(each, masks), masks)
            if progress and total:
                progress(number, total)
    if dataset is not None:
        found.maps = _maps(findings.values(), dataset, facts["detections"])
    return found


def numbers(detection: Mapping[str, Tensor]) -> Found:
    """What a detector finds on one image, in numpy; masks ``[M, H, W]``."""
    found = {name: detection[name] for name in ("boxes", "labels", "scores")}
    found |= {"masks": detection["masks"][:, 0]} if "masks" in detection else {}
    wide = {name: each.float() if each.dtype == torch.bfloat16 else each for name, each in found.items()}  # numpy lacks
    return {name: each.cpu().numpy() for name, each in wide.items()}


def where_it_parts(model: nn.Module, file: Exported, image: Tensor) -> str:
    """The first of all stages on which a detector and its file differ on an image ``[3, H, W]`` uint8, in words.

    Args:
        model, file: as of :func:`parity`; the file returns its stages too.
        image: it.
    """
    tolerance = TOLERANCES[file.facts["dtype"]].stage
    with mode(model, training=False):
        eager = intermediates(model, [image.float() / 255])
    batch, sizes = batch_of([image.permute(1, 2, 0).numpy()], file.facts["resize"])
    theirs = dict(zip(file.facts["outputs"], file.run(batch, sizes), strict=True))
    last = ""
    for name, ours in eager.items():
        one, other = ours.float().numpy(), theirs[name]
        if name == "proposals":
            apart = _apart(one[0], other[0])
            if apart > 1 - TOLERANCES[file.facts["dtype"]].share:
                return f"they part at {name}: {apart:.1%} of the eager ones are missing"
        elif one.shape != other.shape:
            return f"they part at {name}: it is {list(one.shape)} eager and {list(other.shape)} exported"
        elif not (difference := float(np.abs(one - other).max())) <= tolerance * max(1.0, float(np.abs(one).max())):
            return f"they part at {name}: values up to {np.abs(one).max():.3g} differ by {difference:.3g}"
        last = name
    return f"all agree up to {last}; they part behind it, where boxes are made and suppressed"


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of boxes ``[M, 4]`` that have no other within a pixel."""
    near = [np.abs(theirs - box).max(axis=1).min() <= 1 for box in ours]
    return 1 - sum(near) / max(1, len(near))


def _pairs(ours: Found, theirs: Found, tolerance: Tolerance) -> list[tuple[int, int]]:
    """Which detections are the same, each at most once."""
    ious = _ious(ours["boxes"], theirs["boxes"])
    same = (ours["labels"][:, None] == theirs["labels"]) & (ious >= tolerance.iou)
    same &= np.abs(ours["scores"][:, None] - theirs["scores"]) <= tolerance.score
    pairs, free = [], np.ones(len(theirs["scores"]), dtype=bool)
    for one in range(len(ours["scores"])):
        for other in sorted(np.flatnonzero(same[one] & free), key=lambda other: -ious[one, other]):
            if "masks" not in ours or _mask_iou(ours["masks"][one], theirs["masks"][other]) >= tolerance.mask:
                pairs.append((one, int(other)))
                free[other] = False
                break
    return pairs


def _ious(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """``[M, 4]`` and ``[K, 4]`` to ``[M, K]``; of two boxes without area that lie in one place, 1."""
    ours, theirs = ours.astype(np.float64)[:, None], theirs.astype(np.float64)
    common = (np.minimum(ours[..., 2:], theirs[..., 2:]) - np.maximum(ours[..., :2], theirs[..., :2])).clip(0).prod(-1)
    whole = (ours[..., 2:] - ours[..., :2]).prod(-1) + (theirs[..., 2:] - theirs[..., :2]).prod(-1) - common
    near = np.abs(ours - theirs).max(axis=-1, initial=0) < 0.01
    return np.where(near, 1.0, common / np.maximum(whole, 1e-12))


def _mask_iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    one, other = ours > 0.5, theirs > 0.5
    whole = (one | other).sum()
    return float((one & other).sum() / whole) if whole else 1.0


def _tensors(found: Found, masks: bool) -> dict[str, Tensor]:
    tensors = {name: torch.from_numpy(found[name]) for name in ("boxes", "labels", "scores")}
    return tensors | ({"masks": torch.from_numpy(found["masks"])[:, None]} if masks else {})


def _maps(findings: Iterable[Findings], dataset: Any, most: int) -> dict[str, tuple[float, ...]]:
    """mAP of boxes, and of masks where there are any, of each of two."""
    scores = [scored([each], dataset, most) for each in findings]
    found: dict[str, tuple[float, ...]] = {"boxes": tuple(each.map for each in scores)}
    masks = tuple(each.segm.map for each in scores if each.segm is not None)
    return found | ({"masks": masks} if len(masks) == len(scores) else {})


def require_parity(model: nn.Module, file: Exported, found: Parity, stages: Callable[[], Exported]) -> None:
    """Refuses a file that differs too much.

    Args:
        model, file: what was compared.
        found: how far they agree.
        stages: makes the file again, with its stages; called where they part.

    Raises:
        InputError: says by how much, and at which stage they part.
    """
    complaint = found.complaint(TOLERANCES[file.facts["dtype"]])
    if complaint is None:
        return
    kind = type(unwrapped(model)).__name__
    where = "" if found.first is None else f"; {where_it_parts(model, stages(), found.first)}"
    inside = f"compared in {file.runtime}, " if file.runtime else ""
    raise InputError(f"{inside}the exported {kind} was not written: {complaint}{where}.")
