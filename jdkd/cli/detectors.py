"""See :class:`DetectorFlags`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jdkd.cli.flags import ModelFlags
from jdkd.errors import InputError, few
from jdkd.files import read_text
from jdkd.notices import say_once

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DetectorFlags:
    """How a detector to train is made, besides its name."""

    choice: ModelFlags = field(default_factory=ModelFlags)
    width: float = 1.0
    """Multiplies the channels of a named spec; of a model, the first share of all channels is kept."""
    depth: float = 1.0
    """Multiplies the blocks of a named spec."""
    fpn: int | None = None
    """Channels of the pyramid, instead of the family's or a spec's multiplied ones; --width narrows a model's."""
    box_head: int | None = None
    """Hidden units of the box head, instead of the family's or a spec's multiplied ones; --width narrows a model's."""
    min_size: int | None = None
    """Short side of the input in pixels [800; ssd: 300, ssdlite: 320]."""
    max_size: int | None = None
    """Longest side of the input in pixels [1333]."""
    max_detections: int | None = None
    """Detections an image that the detector keeps and that are scored [100, torchvision's names: as it has them]."""
    weights: Path | None = None
    """State dict of a backbone or detector to begin with, or DEFAULT, IMAGENET1K_V1, COCO_V1 of torchvision."""

    def built(
        self, name: str, classes: tuple[str, ...], seed: int, *, is_spec: bool = False
    ) -> tuple[nn.Module, Path | None]:
        """The detector to train, for the classes of the data, and the file of the weights that it begins with, if any.

        Args:
            name: as of :func:`jdkd.detect.open_model`.
            classes: of the data.
            seed: of fresh weights.
            is_spec: whether a file is of a spec, whose classes must be those of the data.

        Raises:
            InputError: it is unknown, or a flag is not for it.
        """
        import torch

        from jdkd.detect import NAMED_SPECS, frozen_like, load_weights, narrowed, weights_file
        from jdkd.detect.checkpoint import WEIGHTS

        torch.manual_seed(seed)
        is_spec = is_spec or name in NAMED_SPECS
        model = self._of_spec(name, classes) if is_spec else self._of_name(name, classes)
        weights = Path(name) / WEIGHTS if Path(name).is_dir() and not is_spec else None
        if self.weights is not None:
            weights = weights_file(self.weights, model.architecture)
            is_new = not is_spec and self.choice.norm is None and not Path(name).is_dir()
            if is_new and (frozen := frozen_like(model, weights)) is not None:
                model = frozen
            print(f"{self.weights}: {load_weights(model, weights)}")
        if not is_spec and self.width != 1:
            model = narrowed(model, self.width)
        return model, weights

    def _of_spec(self, name: str, classes: tuple[str, ...]) -> nn.Module:
        """A detector of a named spec or of the file of one.

        Raises:
            InputError: the spec is unknown or unreadable, or a flag only fits a named one.
        """
        from jdkd.detect import DetectorSpec, build, named_spec

        for flag in ("backbone", "pyramid"):
            if (value := getattr(self.choice, flag)) is not None:
                raise InputError(f"--{flag} {value} is for --model, and a spec has its own; leave it out.")
        sizes = {name: getattr(self, name) for name in ("min_size", "max_size", "max_detections")}
        given = {name: size for name, size in sizes.items() if size is not None}
        norm = {} if self.choice.norm is None else {"norm": self.choice.norm}
        file = Path(name)
        if not (file.suffix == ".json" or file.is_file()):
            widths = {"width": self.width, "depth": self.depth, "fpn": self.fpn, "box_head": self.box_head}
            return build(named_spec(name, classes, **widths, **given).replace(**norm))
        if (self.width, self.depth) != (1.0, 1.0):
            raise InputError(
                f"--width {self.width:g} and --depth {self.depth:g} multiply a named spec, but --spec is the "
                f"file {file}; change the file or name a spec."
            )
        text = read_text(file, "give --spec a JSON file or a named spec")
        if file.name == "architecture.json":
            raise InputError(f"{file} is of a detector that has weights; give its folder as --model.")
        spec = DetectorSpec.from_json(text, source=str(file))
        if spec.classes != tuple(classes):
            raise InputError(
                f"{file} has the classes {few(spec.classes)}, the data {few(classes)}; give the data's classes to the "
                "spec."
            )
        given |= {name: getattr(self, name) for name in ("fpn", "box_head") if getattr(self, name) is not None}
        return build(spec.replace(**given, **norm))

    def _of_name(self, name: str, classes: tuple[str, ...]) -> nn.Module:
        """A detector by its name, its function, its file or its folder, for the classes of the data.

        Raises:
            InputError: there is none, or a flag is not for it.
        """
        from jdkd.detect import adapt_classes, open_model
        from jdkd.rewrite import describe

        if self.depth != 1:
            raise InputError(
                f"--depth {self.depth:g} multiplies the blocks of a named spec, and {name} has those of its "
                "name; leave it out, or give a backbone with more or fewer."
            )
        own = {name: getattr(self, name) for name in ("box_head", "min_size", "max_size", "max_detections")}
        model = open_model(name, classes=len(classes), channels=self.fpn, **own, **vars(self.choice))
        adapt_classes(model, len(classes))
        known = model.architecture
        if known.classes and known.classes != classes and len(known.classes) == len(classes):
            say_once(
                f"{name} was made for {', '.join(known.classes)[:80]}; its predictors go on as those of "
                f"{', '.join(classes)[:80]}"
            )
        model.architecture = describe(model, known.builder, known.arguments, classes=classes)
        return model
