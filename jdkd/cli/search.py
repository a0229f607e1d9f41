"""`jdkd search`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, resolve_device
from jdkd.cli.live import SearchProgress
from jdkd.errors import InputError
from jdkd.run_folder import RunFolder

if TYPE_CHECKING:
    from jdkd.data import Split


@dataclass(frozen=True)
class Search:
    """Search a faster student of a base detector, and train it.

    Ends with exit code 2 where no student reaches the latency asked for; everything is written all the same.

    Example: jdkd search --base runs/base --data data --out runs/search --target-latency 0.53
    """

    base: Path
    """Folder of the base detector, written by train or import."""
    out: Path
    """Folder for the students, result.json, archive.sqlite, pareto.png, report.html."""
    source: DataFlags = field(default_factory=DataFlags)
    selection_images: Path | None = None
    """Folder of images to select on; mAP is then reported on all of val [select on half of val, report on the rest]."""
    selection_annotations: Path | None = None
    """COCO annotations of the images to select on; no detector may have been trained on them."""
    teacher_pool: Path | None = None
    """Folder of a finished teacher pool; without it, one is grown from the base."""
    teachers: tuple[Path, ...] = ()
    """Folders of other detectors of the same classes that may teach."""
    target_latency: float | None = None
    """End-to-end latency to reach, as a fraction of the base's [0.53]."""
    targets: str | None = None
    """Several at once, such as 0.75,0.53,0.35: a front with a student for each, instead of --target-latency."""
    target_map: float | None = None
    """mAP on selecting images that is enough: the fastest with it, within the latency above (0.53 if not given)."""
    steps: int | None = None
    """Training steps of pool and candidates together."""
    epochs: float | None = None
    """The same in epochs of the training images [24]."""
    minutes: float | None = None
    """The same in minutes of training, by the time of a step of the base on this machine."""
    candidates: int = 3
    """Students to train in every generation that looks for an architecture."""
    proposals: int = 8
    """Students to screen, untrained, for each of these generations."""
    no_control: bool = False
    """Leave out the control: the base trained as long as the student, to compare with, outside of the budget."""
    workers: int = 0
    """Processes that train candidates at once."""
    ray: str | None = None
    """Address of a Ray cluster that trains them, or auto."""
    batch_size: int = 8
    """Images per step."""
    lr: float = 2e-3
    """Peak learning rate."""
    train_sizes: tuple[int, ...] = ()
    """Short sides in pixels of training images, of students with a smaller input in proportion [as of the base]."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: on a GPU."""
    runtime: Literal["eager", "compile", "cudagraph", "onnxruntime", "openvino", "tensorrt"] = "eager"
    """What will run the students, and what they are timed in."""
    latency_seconds: float = 10.0
    """How long the timing of a student that may be chosen lasts."""
    seed: int = 0
    """Decides everything that is drawn."""
    loaders: int = 0
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    tensorboard: bool = False
    """Write TensorBoard events to OUT/tensorboard as the search goes."""
    optuna: str | None = None
    """Mirror the candidates as an Optuna study in this storage, such as sqlite:///study.db."""
    resume: bool = False
    """Carry on what OUT holds."""

    def __call__(self) -> None:
        from rich.console import Console

        from jdkd.report import Mirrors, result_table, verdict, write_report
        from jdkd.search import SearchConfig, search

        (train, val), selection = self.source.splits(), self._selection()
        settings = {field.name for field in dataclasses.fields(SearchConfig)} & vars(self).keys()
        given = {name: getattr(self, name) for name in settings} | {"device": resolve_device(self.device)}
        given |= {"targets": self._targets(), "control": not self.no_control, "train_sizes": self.train_sizes or None}
        command = ("jdkd", *sys.argv[1:])
        config = SearchConfig(**given, train=train, val=val, selection=selection, command=command)
        run, mirrors = RunFolder(self.out), Mirrors(self.out, self.optuna, self.tensorboard)
        shown = SearchProgress(self.out, config.targets, mirrors.update)
        with keeping(run, lambda: "every finished candidate and the last checkpoint"), shown as progress:
            result = search(config, progress=progress)
            plot, page = write_report(self.out)
            mirrors.close()
        Console().print(result_table(result))
        students = [self.out / student["folder"] for student in result["students"]]
        for path in (*students, self.out / "result.json", self.out / "archive.sqlite", plot, page):
            print(path)
        if not result["target_met"]:
            raise InputError(
                f"{verdict(result)} Give {self._larger()} or more --candidates and --steps, in another folder."
            )

    def _larger(self) -> str:
        """What asks for less."""
        latency = "a larger --target-latency" if self.targets is None else "larger --targets"
        return latency if self.target_map is None else f"{latency}, a lower --target-map"

    def _targets(self) -> tuple[float, ...]:
        """The latencies to reach.

        Raises:
            InputError: they are no numbers, or are given twice.
        """
        from jdkd.search import SearchConfig

        if self.targets is None:
            return SearchConfig.targets if self.target_latency is None else (self.target_latency,)
        if self.target_latency is not None:
            raise InputError("--targets and --target-latency are both given; give all in --targets.")
        try:
            return tuple(float(target) for target in self.targets.split(","))
        except ValueError:
            raise InputError(f"--targets is {self.targets!r}; give fractions such as 0.75,0.53,0.35.") from None

    def _selection(self) -> Split | None:
        """The images to select on, where they are given.

        Raises:
            InputError: only one of the two flags is given, or what it names does not exist.
        """
        from jdkd.data import resolve_split

        images, annotations = self.selection_images, self.selection_annotations
        if images is None and annotations is None:
            return None
        if images is None or annotations is None:
            given, missing = ("annotations", "images") if images is None else ("images", "annotations")
            raise InputError(
                f"--selection-{given} is given without --selection-{missing}; give both, or neither to select on half "
                "of val."
            )
        return resolve_split("selection", None, images, annotations, self.source.strict)
