"""`jdkd import`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jdkd.cli.flags import ModelFlags
from jdkd.errors import InputError
from jdkd.files import claim_folder, read_text


@dataclass(frozen=True)
class Import:
    """Make a checkpoint folder, which every other command takes, of a detector from elsewhere.

    Example: jdkd import my.nets:detector --weights my.pth --classes cat dog --out runs/base
    """

    model: str
    """Name of a detector of torchvision or of a family, package.module:function, or a folder that import wrote."""
    out: Path | None = None
    """Folder for architecture.json and weights.safetensors; must be given."""
    choice: ModelFlags = field(default_factory=ModelFlags)
    weights: Path | None = None
    """State dict, a training checkpoint that holds one, or DEFAULT, COCO_V1 of torchvision; else the builder's own."""
    classes: tuple[str, ...] = ()
    """Names of the object classes, or a file with one a line; predictors for another number are made anew."""
    norm_eps: float | None = None
    """Of batch norms that were frozen when the weights were made [what torchvision has]."""

    def __call__(self) -> None:
        import torch

        from jdkd.detect import import_detector, parameter_count
        from jdkd.detect.checkpoint import ARCHITECTURE, WEIGHTS
        from jdkd.rewrite import save_architecture

        if self.out is None:
            raise InputError("--out is missing; give a folder for the checkpoint.")
        if held := [name for name in (ARCHITECTURE, WEIGHTS) if (self.out / name).exists()]:
            raise InputError(f"--out {self.out} already holds {held[0]}; give another folder.")
        torch.manual_seed(0)  # of predictors that are made anew
        how = {"classes": self._names(), "norm_eps": self.norm_eps, **vars(self.choice)}
        model = import_detector(self.model, self.weights, **how)
        claim_folder(self.out, "--out")
        save_architecture(self.out, model, model.architecture)
        print(f"{type(model).__name__}, {parameter_count(model) / 1e6:.2f} M parameters, {model.architecture.id}")
        for name in (ARCHITECTURE, WEIGHTS):
            print(self.out / name)

    def _names(self) -> tuple[str, ...]:
        if len(self.classes) != 1 or not Path(self.classes[0]).is_file():
            return self.classes
        remedy = "give --classes names, or a file with one a line"
        text = read_text(Path(self.classes[0]), remedy)
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not names:
            raise InputError(f"--classes {self.classes[0]} holds no name; {remedy}.")
        return names
