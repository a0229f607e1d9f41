"""What the commands that train one detector have in common: they open data, train, save, score and tell."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, RecipeFlags, TrainingFlags, record_of
from jdkd.cli.progress import MIRROR_SECONDS, Progress
from jdkd.errors import InputError, few
from jdkd.files import content_hash, write_json
from jdkd.notices import say_once
from jdkd.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from jdkd.data import CocoDetectionDataset, Split
    from jdkd.report import Mirrors
    from jdkd.train import FitReport, TrainConfig


Fitting = Callable[["Progress", Mapping[str, Any]], "FitReport"]


@dataclass(frozen=True)
class Data:
    """Both splits of the data of a training, opened."""

    splits: tuple[Split, Split]
    train: CocoDetectionDataset
    val: CocoDetectionDataset

    @classmethod
    def opened(cls, source: DataFlags) -> Data:
        """What the flags name.

        Raises:
            InputError: one split cannot be used, or they differ in their classes.
        """
        from jdkd.data import CocoDetectionDataset
        from jdkd.data.copies import say_if_trained_on
        from jdkd.train.distributed import first_goes_ahead, from_first

        splits = source.splits()
        with Progress() as progress, first_goes_ahead():
            train, val = (CocoDetectionDataset(split, progress.task(f"check {split.name} images")) for split in splits)
        if train.classes != val.classes:
            raise InputError(
                f"the training data have the classes {few(train.classes)}, the validation data {few(val.classes)}; "
                "give splits of one data set."
            )
        from_first(lambda: say_if_trained_on(val, train))
        return cls(splits, train, val)

    def of(self, model: nn.Module, batch_size: int, seed: int) -> Data:
        """The same with what a detector trains on in the targets; it has been shown a batch.

        Raises:
            InputError: it does not train on such data, or an image is too elongated for its input size.
        """
        from jdkd.detect.input_size import require_visible
        from jdkd.train.inputs import data_for

        require_visible(model, self.train.sizes)
        return dataclasses.replace(self, train=data_for(model, self.train, batch_size=batch_size, seed=seed))


def opened(
    kind: str, out: Path, source: DataFlags, recipe: RecipeFlags, training: TrainingFlags, **defaults: Any
) -> tuple[Data, TrainConfig]:
    """Data and settings of a training, once its folder is seen to be free, or to hold one of these settings to resume.

    Args:
        kind: name of the command.
        out: the folder.
        source, recipe, training: the flags.
        defaults: settings where no flag says another.

    Raises:
        InputError: the folder is another run's or flags cannot be used, which is found before data are read, or data
            cannot be.
    """
    from jdkd.train.distributed import from_first

    run = RunFolder(out)
    from_first(lambda: run.require(kind, resume=training.resume))
    training.config(None, **defaults | recipe.settings(1, training.accumulate))  # refused before data are read
    data = Data.opened(source)
    config = training.config(data.train, **defaults | recipe.settings(len(data.train), training.accumulate))
    from_first(lambda: run.require(kind, {"training": config.identity()}, resume=training.resume))
    return data, config


@dataclass(frozen=True)
class Job:
    """The training of a detector in a folder of its own.

    Args:
        kind: name of the command, and of the file of what came of it.
        out: the folder.
        model: to be trained.
        weights: the file that it begins with.
        data: to train and to score on.
        config: the settings.
        recipe, training: the flags.
        device: of this process.
    """

    kind: str
    out: Path
    model: nn.Module
    weights: Path | None
    data: Data
    config: TrainConfig
    recipe: RecipeFlags
    training: TrainingFlags
    device: str

    def run(self, fitting: Fitting, facts: Mapping[str, Any] | None = None, **identity: Any) -> None:
        """Trains the detector, or carries that on; saves, scores and tells.

        Args:
            fitting: trains it, with the progress to report to and with what :func:`jdkd.train.fit` takes of a folder.
            facts: what is written beside the scores; ``fitting`` may add to it.
            identity: what a resumed run must have in common with the first, besides what every training has.

        Raises:
            InputError: the folder is another run's, an image that it would be scored on in the end is too elongated for
                it, or it has no input size that could be another while it trains; nothing has been written then.
        """
        from jdkd.detect import save
        from jdkd.detect.input_size import require_resizing, require_visible
        from jdkd.latency import fuse_for_inference
        from jdkd.train import evaluate
        from jdkd.train.distributed import from_first, is_first

        require_visible(self.model, self.data.val.sizes)
        require_resizing(self.model, self.config.sizes)
        run, mirrors = RunFolder(self.out), self._mirrors()
        with keeping(run, lambda: self.training.kept(self.out)):
            same, record = self._identity() | identity, record_of(self.data.splits, self.device)
            resumed = from_first(lambda: run.begin(self.kind, same, resume=self.training.resume, **record))
            with Progress() as progress:
                shown = _mirrored(self.shown(progress, self.kind), mirrors)
                how = {"device": self.device, "folder": self.out, "resume": resumed, "progress": shown}
                report = fitting(progress, how)
                if is_first():
                    save(self.out, self.model)
                scored = {"device": self.device, "batch_size": self.config.batch_size, "workers": self.training.workers}
                scored |= {"shared": True, "progress": progress.task("evaluate")}
                scores = evaluate(fuse_for_inference(self.model), self.data.val, **scored)
                if not is_first():  # which writes
                    return
            content = _summary(self.model, scores, report, self.data.val.sizes[0][1:]) | {
                "config": dataclasses.asdict(self.config),
                "device": self.device,
                **identity,
                **(facts or {}),
            }
            write_json(self.out / f"{self.kind}.json", content)
            if mirrors is not None:
                mirrors.close()
            run.finish()
        _print(self.out, f"{self.kind}.json", content, scores.text)

    def shown(self, progress: Progress, name: str) -> Callable[..., None]:
        """Where a training of these settings reports to."""
        from jdkd.train.distributed import processes

        return progress.training(name, self.config.batch_size * self.config.accumulate * processes())

    def _mirrors(self) -> Mirrors | None:
        """TensorBoard's events, where they are asked for; before anything is written."""
        from jdkd.train.distributed import is_first

        if not self.recipe.tensorboard or not is_first():
            return None
        from jdkd.report import Mirrors

        return Mirrors(self.out, tensorboard=True)

    def _identity(self) -> dict[str, Any]:
        return {
            "architecture": json.loads(self.model.architecture.to_json()),
            "weights": self.weights and content_hash(self.weights),
            "data": {"train": self.data.train.fingerprint, "val": self.data.val.fingerprint},
            "training": self.config.identity(),
        }


def say_where_nothing_synchronises(norm: str | None, device: str) -> None:
    """Says that one process has nobody to synchronise norms with."""
    from jdkd.train.distributed import processes

    if norm == "sync" and processes() == 1:
        say_once(
            "norm sync takes statistics over several processes on GPUs, and this is one process on "
            f"{device}, where it does what batch does"
        )


def _mirrored(shown: Callable[..., None], mirrors: Mirrors | None) -> Callable[..., None]:
    """Brings TensorBoard's events up to date now and then."""
    if mirrors is None:
        return shown
    last = time.monotonic()

    def report(*state: Any) -> None:
        nonlocal last
        shown(*state)
        if time.monotonic() - last >= MIRROR_SECONDS:
            mirrors.update()
            last = time.monotonic()

    return report


def _summary(model: Any, scores: Any, report: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Scores, cost and what the training took, JSON-able; ``size`` is of an image."""
    from jdkd.latency import profile_cost

    cost = profile_cost(model, otherwise=size)
    return {
        **scores.numbers,
        "params": cost.params,
        "gmacs": cost.gmacs,
        "architecture": model.architecture.id,
        "train_steps": report.steps,
        "seconds": report.seconds,
        "losses": report.losses,
    }


def _print(out: Path, summary: str, content: dict[str, Any], lines: str) -> None:
    print(lines)
    print(
        f"mAP {content['map']:.3f}, mAP50 {content['map50']:.3f}, {content['params'] / 1e6:.2f} M "
        f"parameters, {content['gmacs']:.2f} GMACs, {content['train_steps']} steps in "
        f"{content['seconds']:.0f} s"
    )
    for name in ("architecture.json", "weights.safetensors", summary, "log.jsonl"):
        if (out / name).is_file():  # a training of no steps has no log
            print(out / name)
