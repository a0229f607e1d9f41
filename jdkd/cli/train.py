"""`jdkd train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jdkd.cli.detectors import DetectorFlags
from jdkd.cli.flags import DataFlags, RecipeFlags, TrainingFlags
from jdkd.cli.training import Job, opened, say_where_nothing_synchronises
from jdkd.errors import InputError


@dataclass(frozen=True)
class Train:
    """Train a base detector and score it on the validation split.

    Several processes: torchrun --nproc-per-node N -m jdkd train ...; --batch-size is of each.

    Example: jdkd train --model fcos --backbone resnet18 --data data --out runs/base --schedule 1x
    """

    out: Path
    """Folder for architecture.json, weights.safetensors, train.json, log.jsonl."""
    model: str | None = None
    """Detector of torchvision, family (fcos, with --backbone), package.module:function, folder of a detector, or JSON
    file of an architecture; must be given."""
    detector: DetectorFlags = field(default_factory=DetectorFlags)
    source: DataFlags = field(default_factory=DataFlags)
    recipe: RecipeFlags = field(default_factory=RecipeFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)

    def __call__(self) -> None:
        with self.training.processes() as device:
            self._run(device)

    def _run(self, device: str) -> None:
        from jdkd.train import fit

        if self.model is None:
            raise InputError("--model is missing; give the detector to train.")
        say_where_nothing_synchronises(self.detector.choice.norm, device)
        data, config = opened("train", self.out, self.source, self.recipe, self.training)
        model, weights = self.detector.built(self.model, data.train.classes, config.seed)
        data = data.of(model, config.batch_size, config.seed)
        job = Job("train", self.out, model, weights, data, config, self.recipe, self.training, device)
        job.run(lambda progress, how: fit(model, data.train, config, **how))
