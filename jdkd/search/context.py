"""What stays the same during a search: the base, the data and how they are divided."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.data import CocoDetectionDataset, batches
from jdkd.data.splits import whereabouts
from jdkd.detect import load, read
from jdkd.detect.architecture import architecture_of, require_classes
from jdkd.detect.checkpoint import ARCHITECTURE, WEIGHTS
from jdkd.detect.input_size import input_size, sizes_in_proportion
from jdkd.errors import InputError
from jdkd.export.runtimes import known_runtimes
from jdkd.files import content_hash, read_as, write_json
from jdkd.graph import Topology
from jdkd.latency import QUICK, REPORTED, Ratio, fuse_for_inference, measure, profile_cost
from jdkd.latency.protocol import conditions_of
from jdkd.latency.runtimes import Runtime, require_runnable
from jdkd.latency.table import LatencyTable
from jdkd.latency.versions import measure_table
from jdkd.morph.gradients import smallest_loss
from jdkd.notices import ProgressCallback, say_once
from jdkd.pool.elastic_pool import POOL
from jdkd.pool.shrinking import calibrate
from jdkd.search.archive import Candidate
from jdkd.search.budget import steps_of
from jdkd.search.config import SearchConfig
from jdkd.search.selection import Part, divide, say_if_trained_elsewhere
from jdkd.search.spending import Spending
from jdkd.search.timing import BRIEF, Timing, machine_of, pooled
from jdkd.train import Scores, TrainConfig, evaluate, fit
from jdkd.train.inputs import data_for
from jdkd.train.record import trained_on

TIMING_IMAGES = 8
PROBE_BATCHES = 3  # for repair and correlations
WEIGHING_BATCHES = 8  # for importance: on two FCOS cuts by it kept as high an r as cuts by 32, to 0.003 on average
WEIGHING_SHARE = 0.01  # of the budget that they are at most
BUDGET = "budget.json"
BY_HEART = 0.001  # of the base's largest loss: below it a loss is nearly gone; of two bases of photographs it was 0.03
TRAINING = "training"  # folder of a checkpoint and a log, in that of a candidate or of the control
BUDGET_STEPS = 3  # of the base, that a budget in minutes is measured by
MATERIAL = (
    *("targets", "target_map", "minutes", "candidates", "proposals", "batch_size", "lr", "amp", "seed"),
    *("control", "feature_weight", "head_weight", "resolutions", "runtime"),
)  # settings that make a search the one it is


@dataclass
class SearchContext:
    """The constants of a search.

    Args:
        config: what was asked for.
        base: the base detector, on the device, in evaluation mode.
        deployed_base: the base as it would be deployed; latencies are relative to it.
        train: to train on.
        selection, report: to select on and to report on; no image is in two of the three.
        timing_images: what latency is measured with, uint8 ``[3, H, W]``.
        progress: called with (what, done, total, values) as the work goes on.
        spent: where the time of this process goes.
        children: made while they were proposed, by the numbers of the candidates that they are; none in another process
            or after a kill, where they are made again.
    """

    config: SearchConfig
    base: nn.Module
    deployed_base: nn.Module
    train: CocoDetectionDataset
    selection: Part
    report: Part
    timing_images: list[Tensor]
    progress: ProgressCallback
    spent: Spending = field(default_factory=Spending)
    children: dict[int, nn.Module] = field(default_factory=dict)

    @property
    def image_sizes(self) -> list[tuple[str, int, int]]:
        """(file name, height, width) of every image, also of those that report: a student has to see them all."""
        return [size for data in (self.train, self.selection.dataset, self.report.dataset) for size in data.sizes]

    @property
    def resolutions(self) -> list[int]:
        """Short sides that a student may choose from, in pixels; none where the base's input size is not its own."""
        base = input_size(self.base)
        shares = self.config.resolutions if base else ()
        return sorted({base[0] if share == 1 else max(32, round(base[0] * share / 32) * 32) for share in shares})

    @property
    def most_blocks(self) -> int:
        """Blocks that no list of a student grows beyond."""
        return max((len(blocks.blocks) for blocks in self.topology.block_lists), default=0) + 1

    @cached_property
    def steps(self) -> int:
        """The budget in training steps; one in minutes is kept on disk, as it follows from how fast this machine is."""
        config, file = self.config, self.config.out / BUDGET
        if config.minutes is None:
            return steps_of(config, len(self.train))
        if file.exists():
            return read_as(lambda kept: int(kept["steps"]), file, f"remove {config.out} and begin again")
        self.progress("timing a step of the base", 0, 1, {})
        report = fit(copy.deepcopy(self.base), self.train, self.training(BUDGET_STEPS, seed=0), device=config.device)
        self.progress("timing a step of the base", 1, 1, {})
        return steps_of(config, len(self.train), report.seconds / BUDGET_STEPS)

    def keep_budget(self) -> None:
        """Keeps a budget that was measured."""
        if self.config.minutes is not None:
            write_json(self.config.out / BUDGET, {"minutes": self.config.minutes, "steps": self.steps})

    def probe(self) -> Iterator[Any]:
        """A few training batches, always the same: copies, as they are read once for all who look at them."""
        return map(copy.deepcopy, self._probe)

    @cached_property
    def _probe(self) -> list[Any]:
        return [*self._batches()]

    @property
    def weighing(self) -> Iterator[Any]:
        """Training batches, always the same, that importance is read off."""
        share = int(WEIGHING_SHARE * self.steps)
        return self._batches(max(PROBE_BATCHES, min(WEIGHING_BATCHES, share)))

    @cached_property
    def relative(self) -> bool:
        """Whether importance is of each loss over its own size.

        As it is, a loss that the base has learnt by heart has next to no gradient, and what it needs seems not to
        matter. Elsewhere it is of their sum: by each over itself a student of photographs was worse, in one search.
        """
        asked = self.config.method.relative
        if asked is not None:
            return asked
        share = smallest_loss(self.base, self.weighing)
        if share < BY_HEART and not self.config.train_sizes and self.resolutions:
            say_once(
                f"the base knows its training images by heart (one of its losses on them is {share:.1g} of the "
                "largest), so that they teach little more as they are; base and students may find far more if the "
                "images are shown to them at several sizes (--train-sizes of train and search)."
            )
        return share < BY_HEART

    def _batches(self, count: int = PROBE_BATCHES) -> Iterator[Any]:
        config = self.config
        how = {"batch_size": config.batch_size, "seed": config.seed, "device": config.device}
        return batches(self.train, steps=count, **how)

    def calibrated(self, model: nn.Module) -> nn.Module:
        """The model with recalibrated batch norms, in evaluation mode on the device."""
        config = self.config
        return calibrate(model, self.train, config.batch_size, config.seed, config.device)

    def timed(
        self, detectors: Mapping[str, nn.Module], stage: str = BRIEF, *, kept: Sequence[int] | None = None
    ) -> dict[str, Timing]:
        """One interleaved measurement of the base and of other architectures.

        Args:
            detectors: by the id of their architecture; one of the base's own is not timed, as its ratio is 1.
            stage: how long.
            kept: for detectors that are not trained: how many boxes all keep then, without NMS, see
                :func:`jdkd.detect.proposals.steady_nms`.

        Returns:
            By the same ids, and the base's.
        """
        config, base = self.config, self.base_id
        schedule, rounds = vars(QUICK), config.latency_rounds
        if stage != BRIEF:
            seconds, rounds = config.latency_seconds, 5 * rounds
            schedule = vars(REPORTED) | {"min_seconds": seconds, "max_seconds": max(REPORTED.max_seconds, 2 * seconds)}
            schedule["warmup_seconds"] = min(REPORTED.warmup_seconds, seconds)
        with self.spent.on("timing"), nullcontext() if kept is None else self.runtime.steady_nms(kept):
            models = {id_: fuse_for_inference(model) for id_, model in detectors.items() if id_ != base}
            measured = measure(
                {base: self.deployed_base, **models},
                self.timing_images,
                device=config.device,
                modes=("end_to_end",),
                runtime=self.runtime,
                brief=True,
                progress=(lambda *state: self.progress("timing", *state)) if stage != BRIEF else None,
                **schedule | {"rounds": rounds},
            )
        samples = {name: model.end_to_end.samples for name, model in measured.models.items()}
        return {name: Timing(name, stage, measured.environment, own, samples[base]) for name, own in samples.items()}

    def against_itself(self) -> Ratio:
        """The base timed against a copy of itself: what the clock makes of no difference at all."""
        return pooled([self.timed({"copy": copy.deepcopy(self.base)})["copy"]]).ratio

    def latency_table(self) -> LatencyTable:
        """What each part of the base costs on this device, measured."""
        told = lambda *state: self.progress("timing the parts of the base", *state)  # noqa: E731
        how = {"device": self.config.device, "runtime": self.runtime, "progress": told}
        with self.spent.on("timing"):
            return measure_table(self.base, self.topology, self.timing_images, **how)

    def folder(self, number: int) -> Path:
        """Where a candidate lies."""
        return self.config.out / candidate_folder(number)

    def made(self, number: int) -> nn.Module:
        """A candidate as its training left it, on the device.

        Raises:
            InputError: its folder is damaged or gone.
        """
        try:
            return load(self.folder(number), self.config.device)
        except InputError as error:
            raise InputError(
                f"candidate {number} of this search cannot be opened: {str(error).partition('; ')[0]}; copy "
                f"{self.folder(number)} again, or search into another folder."
            ) from None

    def detector(self, candidate: Candidate) -> nn.Module:
        """A candidate of the archive, on the device."""
        return self.base if candidate.kind == "base" else self.made(candidate.number)

    def scored(self, detector: nn.Module, part: Part) -> Scores:
        """Scores a detector on the images that select or report, as it would be deployed."""
        config = self.config
        return evaluate(fuse_for_inference(detector), part.dataset, device=config.device, batch_size=config.batch_size)

    def cost(self, detector: nn.Module) -> dict[str, Any]:
        """Parameters and GMACs of a detector, for the first of the timing images."""
        cost = profile_cost(detector, tuple(self.timing_images[0].shape[1:]))
        return {"params": cost.params, "gmacs": cost.gmacs}

    @property
    def base_id(self) -> str:
        """The id of the base's architecture."""
        return architecture_of(self.base, "search").id

    @cached_property
    def topology(self) -> Topology:
        """What is coupled to what in the base, checked; read when it is first asked for."""
        self.progress("reading the base", 0, 1, {})
        topology = read(self.base, check=True)
        self.progress("reading the base", 1, 1, {})
        return topology

    def require_pyramid(self) -> None:
        """Refuses a base without feature maps.

        Raises:
            InputError: no module of it is known to return some.
        """
        if not self.topology.followed:
            raise InputError(
                f"the detector in {self.config.base} has no neck or backbone that returns feature maps [N, C, H, W], "
                "by which teachers teach; name the module that does with jdkd.detect.adopt(..., pyramid=)."
            )

    def try_runtime(self) -> None:
        """Refuses a base that the runtime cannot run.

        Raises:
            InputError: it cannot be written, compiled or captured, or the result does not run.
        """
        if self.config.runtime != "eager":  # in which it was read
            self.progress("trying the runtime", 0, 1, {})
            with torch.inference_mode():
                device = torch.device(self.config.device)
                self.runtime.prepare(self.deployed_base, [self.timing_images[:1]], device, "float32")
            self.progress("trying the runtime", 1, 1, {})

    def read(self, detector: nn.Module) -> Topology:
        """What is coupled to what in a descendant of the base; what was checked of the base holds of it too."""
        return self.topology if detector is self.base else read(detector, like=self.topology)

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the students in the end, and runs them here when they are timed."""
        return known_runtimes()[self.config.runtime]

    @property
    def machine(self) -> str:
        """Where the search runs now, as :attr:`Timing.machine` has it."""
        return machine_of(conditions_of(torch.device(self.config.device), self.runtime))

    def training(self, steps: int, seed: int, trained: nn.Module | None = None, **changes: Any) -> TrainConfig:
        """Settings of one training, of the base unless another is given; ``seed`` tells those of a search apart."""
        config = self.config
        settings = {"lr": config.lr, "flip": 0.5 if self.train.mirror_symmetric else 0.0, "checkpoint_every": 25}
        settings |= {"batch_size": config.batch_size, "amp": config.amp, "workers": config.loaders}
        if config.train_sizes:
            settings["sizes"] = sizes_in_proportion(config.train_sizes, trained or self.base, self.base)
        return TrainConfig(steps=steps, seed=1000 * config.seed + seed, **settings | changes)

    def identity(self) -> dict[str, Any]:
        """What a resumed search must have in common with the first: what data, weights and settings are."""
        config, pool = self.config, self.config.teacher_pool
        parts = {"train": self.train, "selection": self.selection.dataset, "report": self.report.dataset}
        return {
            "base": {"architecture": self.base_id, "weights": content_hash(config.base / WEIGHTS)},
            "teacher_pool": pool and content_hash(*(pool / name for name in (POOL, ARCHITECTURE, WEIGHTS))),
            "data": {name: dataset.fingerprint for name, dataset in parts.items()},
            "teachers": {folder.absolute().name: content_hash(folder / WEIGHTS) for folder in config.teachers},
            **{name: getattr(config, name) for name in MATERIAL},
            **({"train_sizes": config.train_sizes} if config.train_sizes else {}),  # which earlier searches had not
            "method": vars(config.method),
            "steps": None if config.minutes else steps_of(config, len(self.train)),
        }

    def where(self) -> dict[str, Any]:
        """Where data, base and teachers lie, and the device: for the record."""
        config = self.config
        splits = {"train": config.train, "val": config.val, "selection": config.selection}
        data = whereabouts({name: split for name, split in splits.items() if split is not None})
        teachers = {folder.absolute().name: str(folder.absolute()) for folder in config.teachers}
        lie = {"base": str(config.base.resolve()), "pool": str(config.pool.absolute()), "teachers": teachers}
        return {"data": data, **lie, "device": config.device}


def candidate_folder(number: int) -> str:
    """Where a candidate lies below the folder of its search."""
    return f"candidates/{number:03d}"


def open_context(config: SearchConfig, progress: ProgressCallback) -> SearchContext:
    """Loads the base and the data.

    Raises:
        InputError: one of them cannot be used, or they do not belong together.
    """
    require_runnable([config.runtime], known_runtimes(), torch.device(config.device), ["float32"])
    base = load(config.base, config.device)
    if not architecture_of(base, "search").classes:
        raise InputError(
            f"the detector in {config.base} does not say which classes it knows; import it with --classes, in the "
            "order of its labels."
        )
    splits = {"training": config.train, "validation": config.val, "selection": config.selection}
    opened = {
        name: CocoDetectionDataset(split, lambda *done, name=name: progress(f"check {name} images", *done, {}))
        for name, split in splits.items()
        if split is not None
    }
    for dataset in opened.values():
        require_classes(base, f"the base in {config.base}", dataset.classes, dataset.split.annotations)
    how = {"batch_size": config.batch_size, "seed": config.seed, "device": config.device}
    train = data_for(base, opened["training"], **how)
    say_if_trained_elsewhere(f"the base in {config.base}", trained_on(config.base), train)
    selection, report = divide(train, opened["validation"], opened.get("selection"))
    count = min(TIMING_IMAGES, len(selection.dataset))
    images = [selection.dataset[i][0] for i in range(count)]
    return SearchContext(config, base, fuse_for_inference(base), train, selection, report, images, progress)
