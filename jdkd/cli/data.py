"""`jdkd data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jdkd.cli.progress import Progress


@dataclass(frozen=True)
class Data:
    """Write the embedded data as a COCO-format folder."""

    what: Literal["digits"]
    """digits: handwritten digits at several scales, overlapping, on photographs."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    train: int = 400
    """Training images."""
    val: int = 100
    """Validation images; none of their digits occur in training images."""
    size: int = 128
    """Height and width in pixels."""
    seed: int = 0
    """Equal seeds give equal images."""
    resume: bool = False
    """Accept a folder that holds exactly these images already."""

    def __call__(self) -> None:
        from jdkd.data import write_digit_scenes

        with Progress() as progress:
            write_digit_scenes(
                self.out,
                train=self.train,
                val=self.val,
                size=self.size,
                seed=self.seed,
                resume=self.resume,
                progress=progress.task("digit scenes"),
            )
        print(f"{self.out}: {self.train} training and {self.val} validation images of {self.size} px")
