"""`jdkd inspect`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jdkd.cli.data import UNFOLDED
from jdkd.cli.flags import ModelFlags
from jdkd.errors import InputError, said
from jdkd.files import require_file, write_whole

if TYPE_CHECKING:
    from torch import nn

    from jdkd.graph import Topology


@dataclass(frozen=True)
class Inspect:
    """Read off any model which channels and blocks can be cut, check it, and say what cannot be and why."""

    model: str
    """Folder of a detector, name of a detector of torchvision or of a family, or package.module:function."""
    choice: ModelFlags = field(default_factory=ModelFlags)
    height: int = 240
    """Of the example image, in pixels; a detector that would resize it to its own input size sees it as it is."""
    width: int = 320
    """Of the example image, in pixels."""
    verify: bool = True
    """Cut every group once and compare with the masked model."""
    json: Path | None = None
    """File for the whole topology."""

    def __call__(self) -> None:
        from rich.console import Console

        from jdkd.detect import open_model
        from jdkd.detect.reading import few_regions
        from jdkd.graph import report

        if self.json is not None:
            require_file(self.json, "--json", begins='{\n  "groups"')
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; give at least 1 pixel.")
        model = open_model(self.model, **vars(self.choice))
        status = Console(stderr=True).status("tracing one forward, then cutting every group")
        with status, few_regions(model, self.height, self.width):
            topology = _topology(model, self.height, self.width, self.verify)
        Console(width=None if sys.stdout.isatty() else UNFOLDED).print(report(topology))
        if self.json is not None:
            write_whole(self.json, topology.to_json() + "\n")
            print(self.json)


def _topology(model: nn.Module, height: int, width: int, verify: bool) -> Topology:
    """Traced with one image as detectors take it, or else as a batch of one."""
    import torch

    from jdkd import rewrite
    from jdkd.graph import trace

    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    refusals = []
    for example in ([image], image[None]):
        try:
            topology = trace(model, example)
        except Exception as error:  # whatever a model says of an input that it does not take
            refusals.append(said(error))
            continue
        return rewrite.verify(model, topology, example) if verify else topology
    raise InputError(
        f"{type(model).__name__} runs neither on a list of one image [3, {height}, {width}] ({refusals[0]}) nor on a "
        f"batch of one ({refusals[1]}); give a function that returns a model which does."
    )
