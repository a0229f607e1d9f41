"""`jdkd swap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.cli.evaluate import say_other_names
from jdkd.cli.flags import DataFlags, RecipeFlags, TrainingFlags
from jdkd.cli.progress import Progress
from jdkd.cli.training import Data, Job, opened
from jdkd.files import content_hash, read_as, write_json

if TYPE_CHECKING:
    from torch import nn

BEFORE = "before.json"  # what was measured before the training, for a run that is carried on
PROBED = 8  # training images that the correlation of both pyramids is taken over
WORDS = {"control": "the head's own detector (the control)", "before": "swapped, before training"}


@dataclass(frozen=True)
class Swap:
    """Do features transfer? Put one detector's heads on another's backbone and neck, and train the heads alone.

    Section 3.1 of the PKD paper. Both must have equally wide pyramids, and the heads as many classes as the data; that
    these have other names is said. With one folder as both it is the control of the training itself.

    Example: jdkd swap --features runs/teacher --head runs/student --data coco --out runs/swapped --steps 2000
    """

    features: Path
    """Folder of the detector whose backbone and neck are taken, and stay as they are."""
    head: Path
    """Folder of the detector whose heads are taken and trained; by itself it is the control."""
    out: Path
    """Folder for architecture.json, weights.safetensors, swap.json, log.jsonl."""
    source: DataFlags = field(default_factory=DataFlags)
    recipe: RecipeFlags = field(default_factory=RecipeFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)

    def __call__(self) -> None:
        with self.training.processes() as device:
            self._run(device)

    def _run(self, device: str) -> None:
        from jdkd.detect import load, swap_features
        from jdkd.detect.checkpoint import WEIGHTS
        from jdkd.nn.necks import backbone_of
        from jdkd.train import fit
        from jdkd.train.distributed import is_first
        from jdkd.train.evaluate import require_same_classes
        from jdkd.train.freezing import frozen

        data, config = opened("swap", self.out, self.source, self.recipe, self.training, gamma_l1=0.0)
        features, head = load(self.features), load(self.head)
        require_same_classes(head, data.val.classes, data.val.label_to_category)
        say_other_names(self.head, head, data.val.classes)
        model = swap_features(features, head)
        data = data.of(model, config.batch_size, config.seed)
        facts: dict[str, Any] = {}

        def fitting(progress: Progress, how: dict[str, Any]) -> Any:
            facts.update(self._before({"control": head, "before": model}, features, data, device, progress))
            with frozen(backbone_of(model)):
                return fit(model, data.train, config, **how)

        weights = self.head / WEIGHTS
        job = Job("swap", self.out, model, weights, data, config, self.recipe, self.training, device)
        job.run(fitting, facts, features=content_hash(self.features / WEIGHTS))
        if is_first():
            for name, words in WORDS.items():
                print(f"mAP {facts[name]['map']:.3f}, mAP50 {facts[name]['map50']:.3f}: {words}")
            agreement = ", ".join(f"{r:.3f} at stride {stride}" for stride, r in facts["r"].items())
            print(f"r of the two pyramids: {agreement}")

    def _before(
        self, models: dict[str, nn.Module], features: nn.Module, data: Data, device: str, progress: Progress
    ) -> dict[str, Any]:
        """What is known before training: the scores of control and of what was swapped, and the r of both pyramids.

        A run that is carried on has it already. All processes score, each its share of the images: a group ends when
        one of it is waited for too long.
        """
        from jdkd.distill import correlations
        from jdkd.latency import fuse_for_inference
        from jdkd.train import evaluate
        from jdkd.train.distributed import from_first

        def known() -> dict[str, Any] | None:
            remedy, names = "remove it and resume", ("r", *models)
            return read_as(lambda content: {n: content[n] for n in names}, kept, remedy) if kept.is_file() else None

        def similarities() -> dict[str, float]:
            images = [data.train[place][0].float() / 255 for place in range(min(PROBED, len(data.train)))]
            both = models["control"].to(device), features.to(device)
            distances = correlations(*both, [[image] for image in images], own_size=True)
            return {str(stride): 1 - distance for stride, distance in distances.items()}

        kept = self.out / BEFORE
        if (before := from_first(known)) is not None:
            return before
        found: dict[str, Any] = {"r": from_first(similarities)}
        how = {"device": device, "workers": self.training.workers, "shared": True}
        for name, model in models.items():
            told = progress.task(f"evaluate {WORDS[name]}")
            found[name] = evaluate(fuse_for_inference(model), data.val, **how, progress=told).numbers
        from_first(lambda: write_json(kept, found))
        return found
