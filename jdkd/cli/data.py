"""`jdkd data`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jdkd.cli.failures import keeping
from jdkd.cli.progress import Progress
from jdkd.run_folder import RunFolder


@dataclass(frozen=True)
class Data:
    """Write the embedded data as a COCO-format folder."""

    what: Literal["digits"]
    """digits: handwritten digits at several scales, overlapping, on photographs."""
    out: Path
    """Folder to write."""
    train: int = 400
    """Training images."""
    val: int = 100
    """Validation images; none of their digits occur in training images."""
    size: int = 128
    """Height and width in pixels."""
    seed: int = 0
    """Equal seeds give equal images."""
    resume: bool = False
    """Carry on what OUT holds."""

    def __call__(self) -> None:
        from jdkd.data import write_digit_scenes

        sizes = {"train": self.train, "val": self.val, "size": self.size, "seed": self.seed}
        run = RunFolder(self.out)
        with keeping(run, "the images written so far"), Progress() as progress:
            command = ["jdkd", *sys.argv[1:]]
            resumed = run.begin("data", sizes, resume=self.resume, command=command)
            if not (resumed and run.read()["finished"]):
                write_digit_scenes(self.out, **sizes, progress=progress.task("digit scenes"))
                run.finish()
        print(f"{self.out}: {self.train} training and {self.val} validation images of {self.size} px")
