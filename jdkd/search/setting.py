"""What stays the same during a search: the base, the data and how they are divided."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from jdkd.data import CocoDetectionDataset, batches
from jdkd.detect import load
from jdkd.errors import InputError
from jdkd.latency import LatencyReport, deployable, percentile, quick
from jdkd.search.config import SearchConfig
from jdkd.train import TrainConfig, calibrate_bn

SELECTION = 0.15  # share of the training images that students are selected on, and at most
MOST_SELECTED = 1000  # so many of them
TIMING_IMAGES = 8
PROBE_BATCHES = 3

Progress = Callable[[str, int, int, dict[str, float]], None]  # what, done, total, values


@dataclass
class Setting:
    """The constants of a search.

    Args:
        config: what was asked for.
        base: the base detector, on the device, in evaluation mode.
        deployed_base: the base as it would be deployed; latencies are relative to it.
        train, selection, val: to train on, to select on, to report on; no image is in two of them.
        timing_images: what latency is measured with, uint8 ``[3, H, W]``.
        progress: told what is going on.
    """

    config: SearchConfig
    base: nn.Module
    deployed_base: nn.Module
    train: CocoDetectionDataset
    selection: CocoDetectionDataset
    val: CocoDetectionDataset
    timing_images: list[Tensor]
    progress: Progress

    def probe(self) -> Iterator[Any]:
        """A few training batches, always the same: for recalibration and for correlations."""
        config = self.config
        return batches(
            self.train,
            batch_size=config.batch_size,
            steps=PROBE_BATCHES,
            seed=config.seed,
            device=config.device,
        )

    def calibrated(self, model: nn.Module) -> nn.Module:
        """The model with recalibrated batch norms, in evaluation mode on the device."""
        calibrate_bn(model.to(self.config.device), self.probe())
        return model.eval()

    def timed(self, models: dict[str, nn.Module]) -> LatencyReport:
        """A short interleaved measurement of the base and of other deployable models."""
        rounds = self.config.latency_rounds
        models = {"base": self.deployed_base} | models
        return quick(models, self.timing_images, device=self.config.device, rounds=rounds)

    @staticmethod
    def quiet_ratio(report: LatencyReport, name: str) -> float:
        """Latency of a model over the base's, each at its 20th percentile.

        So short a measurement may fall into a burst of other work on the machine, which only ever adds: the
        faster calls tell the two apart better than the medians that the final measurement reports.
        """
        times = [report.models[model].end_to_end.samples for model in (name, "base")]
        own, base = (percentile(samples, 20) for samples in times)
        return own / base

    def training(self, steps: int, seed: int, **changes: Any) -> TrainConfig:
        """Settings of one training; ``seed`` tells the trainings of a search apart."""
        config = self.config
        settings = {"lr": config.lr, "flip": 0.5 if self.train.mirror_symmetric else 0.0, "checkpoint_every": 25}
        settings |= {"batch_size": config.batch_size, "amp": config.amp, "workers": config.workers}
        return TrainConfig(steps=steps, seed=1000 * config.seed + seed, **settings | changes)


def open_setting(config: SearchConfig, progress: Progress) -> Setting:
    """Loads the base and the data.

    Raises:
        InputError: one of them cannot be used, or they do not belong together.
    """
    base = load(config.base, config.device)
    everything, val = (
        CocoDetectionDataset(split, lambda done, total, name=name: progress(f"check {name} images", done, total, {}))
        for name, split in (("training", config.train), ("validation", config.val))
    )
    for name, split in (("training", everything), ("validation", val)):
        if split.classes != base.spec.classes:
            raise InputError(
                f"the base in {config.base} knows the classes {_short(base.spec.classes)}, the {name} data has "
                f"{_short(split.classes)}; give the data that the base was made for."
            )
    train, selection = _divided(everything, config)
    images = [val[i][0] for i in range(min(TIMING_IMAGES, len(val)))]
    return Setting(config, base, deployable(base), train, selection, val, images, progress)


def _divided(dataset: CocoDetectionDataset, config: SearchConfig) -> tuple[CocoDetectionDataset, CocoDetectionDataset]:
    held_out = min(MOST_SELECTED, round(SELECTION * len(dataset)))
    if held_out < 1:
        raise InputError(
            f"{config.train.annotations} has {len(dataset)} images, too few to hold some out; give at least 4."
        )
    order = list(range(len(dataset)))
    random.Random(config.seed).shuffle(order)
    return dataset.subset(sorted(order[held_out:])), dataset.subset(sorted(order[:held_out]))


def _short(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
