"""`jdkd eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jdkd.cli.flags import DataFlags, resolve_device, split_of
from jdkd.cli.progress import Progress
from jdkd.files import require_file, write_json
from jdkd.notices import say_once

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Eval:
    """Score a detector on COCO-format data: pycocotools' twelve lines (also of masks), a table of classes, JSON.

    Where no data are given, these are those of the run that the folder is of.
    """

    ckpt: Path
    """Folder of the detector, written by train or import."""
    source: DataFlags = field(default_factory=DataFlags)
    json: Path | None = None
    """File for the JSON; without it, it follows on the last line of the output."""
    split: Literal["val", "train"] = "val"
    """Which images to score on."""
    max_detections: int | None = None
    """Detections an image that are kept and scored [as the detector was trained with: 100]."""
    batch_size: int = 8
    """Images per forward pass."""
    workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __call__(self) -> None:
        from jdkd.data import CocoDetectionDataset
        from jdkd.detect import load
        from jdkd.detect.architecture import identity
        from jdkd.detect.input_size import require_whole
        from jdkd.latency import fuse_for_inference, profile_cost
        from jdkd.train import evaluate

        device = resolve_device(self.device)
        require_whole({"--batch-size": self.batch_size})
        if self.max_detections is not None:
            require_whole({"--max-detections": self.max_detections})
        if self.json is not None:
            require_file(self.json, "--json", begins='{\n  "map"')
        model = load(self.ckpt)
        with Progress() as progress:
            dataset = CocoDetectionDataset(split_of(self.source, self.ckpt, self.split), progress.task("check images"))
            say_other_names(self.ckpt, model, dataset.classes)
            scores = evaluate(
                fuse_for_inference(model),
                dataset,
                device=device,
                batch_size=self.batch_size,
                workers=self.workers,
                max_detections=self.max_detections,
                progress=progress.task("evaluate"),
            )
        cost = profile_cost(model, otherwise=dataset.sizes[0][1:])
        print(scores.text)
        content = {
            **scores.numbers,
            "max_detections": scores.max_detections,
            "params": cost.params,
            "gmacs": cost.gmacs,
            "images": len(dataset),
            "split": self.split,
            "architecture": identity(model),
            "device": device,
        }
        if self.json is None:
            print(dumps(content))
        else:
            write_json(self.json, content)
            print(self.json)


def say_other_names(source: Path | str, model: nn.Module, classes: tuple[str, ...]) -> None:
    """Says that a detector's classes have other names than the data's, where they are as many.

    Args:
        source: what the user calls the detector.
        model: it.
        classes: of the data.
    """
    known = getattr(getattr(model, "architecture", None), "classes", ())
    if len(known) == len(classes) and sorted(known) != sorted(classes):
        say_once(
            f"{source} was made for {', '.join(known)[:80]}; its label k counts as the k-th of "
            f"{', '.join(classes)[:80]}"
        )
