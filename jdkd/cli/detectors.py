"""See :class:`DetectorFlags`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jdkd.cli.flags import ModelFlags
from jdkd.notices import say_once

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DetectorFlags:
    """How a detector to train is made, besides its name."""

    choice: ModelFlags = field(default_factory=ModelFlags)
    width: float = 1.0
    """Share of all channels that is kept, the first ones."""
    fpn: int | None = None
    """Channels of the pyramid and the heads, before --width [256]."""
    box_head: int | None = None
    """Hidden units of the box head, before --width [1024]."""
    min_size: int | None = None
    """Short side of the input in pixels [800; ssd: 300, ssdlite: 320]."""
    max_size: int | None = None
    """Longest side of the input in pixels [1333]."""
    max_detections: int | None = None
    """Detections an image that the detector keeps and that are scored [100, torchvision's names: as it has them]."""
    weights: Path | None = None
    """State dict of a backbone or detector to begin with, or DEFAULT, IMAGENET1K_V1, COCO_V1 of torchvision."""

    def built(self, name: str, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Path | None]:
        """The detector to train, for the classes of the data, and the file of the weights that it begins with, if any.

        Args:
            name: as of :func:`jdkd.detect.open_model`.
            classes: of the data.
            seed: of fresh weights.

        Raises:
            InputError: it is unknown, or a flag is not for it.
        """
        import torch

        from jdkd.detect import frozen_like, load_weights, narrowed, weights_file
        from jdkd.detect.checkpoint import WEIGHTS

        torch.manual_seed(seed)
        model = self._of_name(name, classes)
        weights = Path(name) / WEIGHTS if Path(name).is_dir() else None
        if self.weights is not None:
            is_new = weights is None and self.choice.norm is None
            weights = weights_file(self.weights, model.architecture)
            if is_new and (frozen := frozen_like(model, weights)) is not None:
                model = frozen
            print(f"{self.weights}: {load_weights(model, weights)}")
        if self.width != 1:
            model = narrowed(model, self.width)
        return model, weights

    def _of_name(self, name: str, classes: tuple[str, ...]) -> nn.Module:
        """A detector by its name, its function, its file or its folder, for the classes of the data.

        Raises:
            InputError: there is none, or a flag is not for it.
        """
        from jdkd.detect import adapt_classes, open_model
        from jdkd.rewrite import describe

        own = {flag: getattr(self, flag) for flag in ("box_head", "min_size", "max_size", "max_detections")}
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
