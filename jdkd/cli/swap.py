"""`jdkd swap`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, TrainingFlags
from jdkd.cli.progress import Progress
from jdkd.cli.train import opened, summary
from jdkd.files import content_hash, read_as, write_json
from jdkd.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from jdkd.data import CocoDetectionDataset
    from jdkd.train import TrainConfig

RESULT = "swap.json"
PROBED = 8  # training images that the correlation of both pyramids is taken over
WORDS = {
    "control": "the head's own detector (the control)",
    "before": "swapped, before training",
    "after": "swapped, its head trained",
}


@dataclass(frozen=True)
class Swap:
    """Do features transfer? Put one detector's heads on another's backbone and neck, and train the heads alone.

    Section 3.1 of the PKD paper. Both must have equally wide pyramids and the heads the classes of the data. For
    example:

    jdkd swap --features runs/teacher --head runs/student --data coco --out runs/swapped --steps 2000
    """

    features: Path
    """Folder of the detector whose backbone and neck are taken, and stay as they are."""
    head: Path
    """Folder of the detector whose heads are taken and trained; by itself it is the control."""
    out: Path
    """Folder for architecture.json, weights.safetensors, swap.json, log.jsonl."""
    source: DataFlags = field(default_factory=DataFlags)
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Images per step, of each process."""
    lr: float = 2e-3
    """Peak learning rate of the one cycle."""
    training: TrainingFlags = field(default_factory=TrainingFlags)

    def __call__(self) -> None:
        with self.training.processes() as device:
            self._run(device)

    def _run(self, device: str) -> None:
        from jdkd.data import batches
        from jdkd.data.splits import whereabouts
        from jdkd.detect import load, save, swap_features
        from jdkd.detect.contract import require_learner
        from jdkd.nn.necks import backbone_of
        from jdkd.train import fit
        from jdkd.train.distributed import from_first, is_first
        from jdkd.train.evaluate import require_same_classes
        from jdkd.train.freezing import frozen
        from jdkd.train.inputs import with_targets_of

        splits = self.source.splits()
        train, val = opened(splits)
        config = self.training.config(train, **vars(self), gamma_l1=0.0)
        run = RunFolder(self.out)
        features, head = load(self.features, device), load(self.head, device)
        require_same_classes(head, val.classes, val.label_to_category)
        model = swap_features(features, head)
        train = with_targets_of(model, train)
        first = {"batch_size": min(2, self.batch_size), "steps": 1, "seed": self.training.seed, "device": device}
        require_learner(model, *next(batches(train, **first)))
        with keeping(run, self.training.kept):
            identity = self._identity(model, config, train, val)
            where = {"data": whereabouts({split.name: split for split in splits}), "device": device}
            record = {"command": ["jdkd", *sys.argv[1:]], "where": where}
            resumed = from_first(lambda: run.begin("swap", identity, resume=self.training.resume, **record))
            with Progress() as progress:
                result = from_first(lambda: self._measured(features, head, model, train, val, device, progress))
                with frozen(backbone_of(model)):
                    how = {"device": device, "folder": self.out, "resume": resumed}
                    report = fit(model, train, config, **how, progress=progress.task("train the head"))
                if not is_first():  # which saves and scores
                    return
                save(self.out, model)
                scores = self._scored(model, val, device, progress, "after")
            after = summary(model, scores, report, val.sizes[0][1:])
            content = result | {"after": after, "config": dataclasses.asdict(config), "device": device}
            write_json(self.out / RESULT, content)
            run.finish()
        self._print(content)

    def _measured(
        self,
        features: nn.Module,
        head: nn.Module,
        model: nn.Module,
        train: CocoDetectionDataset,
        val: CocoDetectionDataset,
        device: str,
        progress: Progress,
    ) -> dict[str, Any]:
        """What is known before training: the r of both pyramids, and the scores of control and of what was swapped.

        A run that is carried on has it already.
        """
        from jdkd.distill import correlations

        if (self.out / RESULT).is_file():
            return read_as(lambda kept: {name: kept[name] for name in ("r", "control", "before")}, self.out / RESULT,
                           "remove it and resume: it is measured anew")  # fmt: skip
        images = [train[place][0].float() / 255 for place in range(min(PROBED, len(train)))]
        distances = correlations(head, features, [[image] for image in images], own_size=True)
        result = {
            "r": {str(stride): 1 - distance for stride, distance in distances.items()},
            "control": self._scored(head, val, device, progress, "control").numbers,
            "before": self._scored(model, val, device, progress, "before").numbers,
        }
        write_json(self.out / RESULT, result)
        return result

    def _scored(self, model: nn.Module, val: CocoDetectionDataset, device: str, progress: Progress, what: str) -> Any:
        from jdkd.latency import fuse_for_inference
        from jdkd.train import evaluate

        how = {"device": device, "batch_size": self.batch_size, "workers": self.training.workers}
        return evaluate(fuse_for_inference(model), val, **how, progress=progress.task(f"evaluate {WORDS[what]}"))

    def _identity(
        self, model: nn.Module, config: TrainConfig, train: CocoDetectionDataset, val: CocoDetectionDataset
    ) -> dict[str, Any]:
        """What a resumed run must have in common with the first one."""
        from jdkd.detect.checkpoint import WEIGHTS
        from jdkd.train.config import RESUME_MAY_CHANGE

        training = {name: value for name, value in dataclasses.asdict(config).items() if name not in RESUME_MAY_CHANGE}
        return {
            "architecture": json.loads(model.architecture.to_json()),
            "weights": {name: content_hash(getattr(self, name) / WEIGHTS) for name in ("features", "head")},
            "data": {"train": train.fingerprint, "val": val.fingerprint},
            "training": training,
        }

    def _print(self, content: Mapping[str, Any]) -> None:
        agreement = ", ".join(f"{r:.3f} at stride {stride}" for stride, r in content["r"].items())
        print(f"r of the two pyramids: {agreement}")
        for name, words in WORDS.items():
            print(f"mAP {content[name]['map']:.3f}, mAP50 {content[name]['map50']:.3f}  {words}")
        for name in ("architecture.json", "weights.safetensors", RESULT, "log.jsonl"):
            print(self.out / name)
