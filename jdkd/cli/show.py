"""`jdkd show`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jdkd.cli.evaluate import say_other_names
from jdkd.cli.flags import DataFlags, resolve_device, split_of
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import require_file, write_whole

if TYPE_CHECKING:
    from torch import nn

LOOKED_AT = 8  # images that the correlation of channels is taken over


@dataclass(frozen=True)
class Show:
    """See on a page what detectors find beside what there is to find, worst images first.

    With --teacher also what each channel of a student's pyramid and of its teacher's responds to, and how far the two
    agree (Pearson's r). Where no data are given, these are those of the run that the first detector is of.

    Example: jdkd show runs/student runs/base --data coco --out seen.html --teacher runs/teacher
    """

    detectors: tuple[str, ...]
    """Folders of detectors, or package.module:function; the images are in the order of the first one's scores."""
    source: DataFlags = field(default_factory=DataFlags)
    out: Path | None = None
    """HTML file to write; must be given."""
    teacher: str | None = None
    """Folder of a detector, or package.module:function, whose responses stand beside the first detector's."""
    split: Literal["val", "train"] = "val"
    """Which images to look at."""
    images: int = 12
    """How many of them are shown."""
    threshold: float | None = None
    """Score from which a detection counts [for each detector the one with the best F1 over all images]."""
    channels: int = 16
    """Channels of each level whose responses are drawn, evenly from the lowest r to the highest."""
    batch_size: int = 8
    """Images per forward pass."""
    workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __call__(self) -> None:
        from jdkd.data import CocoDetectionDataset
        from jdkd.detect.input_size import require_whole
        from jdkd.distill.responses import responses
        from jdkd.report.responses import responses_section
        from jdkd.report.seen import Sight, seen_page
        from jdkd.train.image_scores import best_threshold, judged_images, worst_first

        device = resolve_device(self.device)
        self._require_flags()
        for source in (*self.detectors, *([] if self.teacher is None else [self.teacher])):
            require_own_weights(source)
        require_whole(
            {f"--{name.replace('_', '-')}": getattr(self, name) for name in ("images", "channels", "batch_size")}
        )
        with Progress() as progress:
            split = split_of(self.source, Path(self.detectors[0]), self.split)
            dataset = CocoDetectionDataset(split, progress.task("check images"))
            models = {source: detector_of(source, len(dataset.classes)) for source in dict.fromkeys(self.detectors)}
            for source, model in models.items():
                say_other_names(source, model, dataset.classes)
            student, teacher = next(iter(models.values())), None
            if self.teacher is not None:
                teacher = detector_of(self.teacher, len(dataset.classes)).to(device)
                responses(student.to(device), teacher, [dataset[0][0].float() / 255])  # says what does not fit at once
            how = {"device": device, "batch_size": self.batch_size, "workers": self.workers}
            sights = []
            for title, model in zip(titles(list(models)), models.values(), strict=True):
                found = judged_images(model, dataset, **how, progress=progress.task(f"look with {title}"))
                threshold = best_threshold(found) if self.threshold is None else self.threshold
                sights.append(Sight(title, found, threshold))
            looked = ""
            if teacher is not None:
                order = worst_first(sights[0].images, sights[0].threshold)[: self.images]
                images = [dataset[place][0] for place in order[:LOOKED_AT]]
                levels = responses(student, teacher, [image.float() / 255 for image in images])
                names = sights[0].title, f"teacher {titles([self.teacher])[0]}"
                looked = responses_section(levels, images[0], len(images), self.channels, names)
        page = seen_page(dataset, sights, self.images, responses=looked, command=["jdkd", *sys.argv[1:]])
        write_whole(self.out, page)
        for one in sights:
            print(one.sentence())
        print(self.out)

    def _require_flags(self) -> None:
        """Refuses what cannot be shown, before anything is read.

        Raises:
            InputError: names the flag.
        """
        from jdkd.report.layout import GENERATOR

        if not self.detectors:
            raise InputError("no detector is given; give the folder of one, or of several to stand side by side.")
        if self.out is None:
            raise InputError("--out is missing; give an HTML file to write.")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"--out is {self.out}, and a page is written; give a file that ends with .html.")
        require_file(self.out, "--out", holds=GENERATOR)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold:g}; give a score, from 0 to 1.")


def detector_of(source: str, classes: int) -> nn.Module:
    """A detector of a folder, or what a function makes.

    Raises:
        InputError: it cannot be opened.
    """
    from jdkd.detect import load, open_model

    return load(source) if Path(source).is_dir() else open_model(source, classes=classes)


def require_own_weights(source: str) -> None:
    """Refuses what has not learned anything, before data are read.

    Raises:
        InputError: it is a name, FAMILY:BACKBONE too, whose weights are fresh.
    """
    from jdkd.detect.sources import has_own_weights

    if not has_own_weights(source):
        raise InputError(
            f"{source} is no folder of a detector and no package.module:function, and by a name it has fresh weights; "
            "give a folder that `jdkd train` or `jdkd import` wrote."
        )


def titles(sources: Sequence[str]) -> list[str]:
    """What detectors are called on a page: their folders' names, or all of their paths where two share one."""
    names = [Path(source).resolve().name if ":" not in source else source for source in sources]
    return [name if names.count(name) == 1 else source for name, source in zip(names, sources, strict=True)]
