"""`jdkd latency`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.cli.flags import DataFlags, recorded_split, resolve_device
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import read_as, require_file, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jdkd.data import CocoDetectionDataset, Split
    from jdkd.latency import Grid, LatencyReport, Work

MEASUREMENTS = "measurements"


@dataclass(frozen=True)
class Latency:
    """Time detectors against each other: interleaved, warm, with the uncertainty of their ratios, in any runtime."""

    base: Path
    """Folder of the detector that the others are compared with."""
    students: tuple[Path, ...]
    """Folders of the others."""
    source: DataFlags = field(default_factory=DataFlags)
    images: tuple[Path, ...] = ()
    """Image files to measure on, instead of validation images."""
    out: Path | None = None
    """JSON file for samples, environment and protocol."""
    runtimes: tuple[str, ...] = ("eager",)
    """eager, compile, cudagraph, onnxruntime, openvino, tensorrt: what runs them, one after the other."""
    dtypes: tuple[str, ...] = ("float32",)
    """float32, float16, bfloat16: of weights and features."""
    batch_sizes: tuple[int, ...] = (1,)
    """Images per call."""
    modes: tuple[str, ...] = ("end_to_end", "model_only")
    """end_to_end: from images on the host to boxes on it; model_only: from a batch that was resized and normalised."""
    processes: int = 1
    """Repeat all of it in so many fresh processes, and give the interval over them."""
    count: int = 16
    """Validation images to measure on, at most."""
    rounds: int = 100
    """At least so many rounds; each runs every detector twice."""
    seconds: float = 10.0
    """And at least so long."""
    map: bool = False
    """Score each detector in each runtime and dtype on all validation images."""
    profile: bool = False
    """Divide each detector's time among backbone, neck, head, postprocess and what is fixed, run eagerly in float32,
    and say how far each is from its roofline."""
    against: Path | None = None
    """What an earlier --out wrote, to say whether it agrees; of another environment it is refused."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __call__(self) -> None:
        import torch
        from rich.console import Console

        from jdkd.cli.latency_tables import Shown
        from jdkd.detect import load
        from jdkd.detect.checkpoint import WEIGHTS
        from jdkd.detect.stages import stages_of
        from jdkd.export.runtimes import known_runtimes
        from jdkd.latency import measure_grid, profile_cost
        from jdkd.latency.grid import with_facts
        from jdkd.latency.runtimes import require_runnable

        device, grid = resolve_device(self.device), self._grid()
        require_runnable(grid.runtimes, known_runtimes(), torch.device(device), grid.dtypes)
        _require_watched(device)
        if self.count < 1:
            raise InputError(f"--count is {self.count}; measure on at least 1 validation image.")
        if self.out is not None:
            require_file(self.out, "--out", begins='{\n  "time"')
        before = None if self.against is None else _earlier(self.against)
        folders = _named([self.base, *self.students])
        detectors = {name: load(folder) for name, folder in folders.items()}
        if self.profile:
            for model in detectors.values():
                stages_of(model)  # says of which they are not known, before anything is timed
        images, origin, split = self._images(detectors)
        files = {name: {"weights_sha256": sha256_of(folder / WEIGHTS)} for name, folder in folders.items()}
        work = self._work(folders, images, device, split)
        if before is not None:
            _require_comparable(before, work, grid, str(self.against))
        costs = {name: profile_cost(model, otherwise=tuple(images[0].shape[1:])) for name, model in detectors.items()}
        with Progress() as progress:
            told = progress.task("processes" if grid.processes > 1 else "latency")
            reports = [with_facts(report, files) for report in measure_grid(work, grid, told)]
        profiles = self._profiles(detectors, images, device) if self.profile else {}
        shown = Shown(reports, costs, profiles, origin)
        if self.out is not None:
            write_json(self.out, {"time": datetime.now(UTC).isoformat(timespec="seconds"), **shown.to_json()})
        shown.print(Console())
        for report in reports if before is not None else ():
            _print_compared(report, before, str(self.against))
        if self.out is not None:
            print(self.out)

    def _grid(self) -> Grid:
        from jdkd.latency import REPORTED, Grid

        limits = {"max_seconds": 2 * self.seconds, "warmup_limit": self.seconds}  # of slow detectors, which need them
        longer = {name: max(getattr(REPORTED, name), seconds) for name, seconds in limits.items()}
        schedule = replace(REPORTED, rounds=self.rounds, min_seconds=self.seconds, **longer)
        return Grid(self.runtimes, self.dtypes, self.batch_sizes, self.modes, schedule, self.processes)

    def _work(self, folders: dict[str, Path], images: list[Tensor], device: str, split: Split | None) -> Work:
        from jdkd.export.runtimes import known_runtimes
        from jdkd.latency import Work

        if self.map and split is None:
            raise InputError("--map scores on annotated images, and there are none; give --data, and no --images.")
        score = functools.partial(map_on, split, device) if self.map else None
        return Work(functools.partial(_shipped, folders), known_runtimes, images, device, score)

    def _profiles(self, detectors: Mapping[str, nn.Module], images: list[Tensor], device: str) -> dict[str, Any]:
        import torch

        from jdkd.latency import fuse_for_inference, profile_stages
        from jdkd.latency.roofline import measured_ceilings

        how = {"device": device, "batch_size": self.batch_sizes[0], "rounds": min(self.rounds, 50)}
        ceilings = measured_ceilings(torch.device(device))
        return {
            name: profile_stages(fuse_for_inference(model), images, ceilings=ceilings, **how)
            for name, model in detectors.items()
        }

    def _images(self, detectors: Mapping[str, nn.Module]) -> tuple[list[Tensor], str, Split | None]:
        """Images to measure on, where they come from, and the annotated images that they are some of.

        Raises:
            InputError: detectors are to be scored on these, and one is of other classes, or sees nothing of an image.
        """
        from jdkd.data import CocoDetectionDataset, read_image
        from jdkd.data.photographs import photographs
        from jdkd.train.evaluate import prepare

        if self.images:
            return [read_image(file) for file in self.images], f"{len(self.images)} image files", None
        split = self.source.split("val") if self.source.given else recorded_split(self.base, "val", self.source.strict)
        if split is not None:
            with Progress() as progress:
                dataset = CocoDetectionDataset(split, progress.task("check images"))
            for model in detectors.values() if self.map else ():
                prepare(model, dataset)
            chosen = min(self.count, len(dataset))
            return [dataset[index][0] for index in range(chosen)], f"{chosen} images of {split.images}", split
        said = "2 sample photographs; NMS works on what a detector finds, so give --data for the cost on your images"
        return photographs(), said, None


def _shipped(folders: Mapping[str, Path]) -> dict[str, nn.Module]:
    """Detectors from their folders, as they ship: a runtime's file of one is that which `jdkd export` writes of it."""
    from jdkd.detect import load
    from jdkd.detect.checkpoint import WEIGHTS
    from jdkd.export.runtimes import WEIGHTS_SHA256
    from jdkd.latency import fuse_for_inference

    found = {name: fuse_for_inference(load(folder)) for name, folder in folders.items()}
    for name, folder in folders.items():
        setattr(found[name], WEIGHTS_SHA256, sha256_of(folder / WEIGHTS))
    return found


@functools.cache
def dataset_of(split: Split) -> CocoDetectionDataset:
    """The images of a split, opened once a process."""
    from jdkd.data import CocoDetectionDataset

    return CocoDetectionDataset(split)


def map_on(split: Split, device: str, detector: nn.Module) -> float:
    """mAP of a detector, one image at a time, as it is timed."""
    from jdkd.train import evaluate

    return evaluate(detector, dataset_of(split), device=device, batch_size=1).map


def _require_watched(device: str) -> None:
    """Refuses a GPU whose clocks nobody reads."""
    import torch

    from jdkd.latency.watching import NvmlWatch

    if device != "cpu":
        NvmlWatch(torch.device(device))


def _earlier(file: Path) -> list[LatencyReport]:
    """The measurements that an earlier run wrote."""
    from jdkd.latency import LatencyReport

    def reports(content: dict[str, Any]) -> list[LatencyReport]:
        return [LatencyReport.from_json(each) for each in content[MEASUREMENTS]]

    return read_as(reports, file, "give a file that `jdkd latency --out` wrote")


def _require_comparable(before: list[LatencyReport], work: Work, grid: Grid, then: str) -> None:
    """Refuses an earlier measurement that could not be compared with the one that is about to be taken."""
    import torch

    from jdkd.latency.protocol import conditions_of, cudnn_benchmark
    from jdkd.latency.records import images_sha256, matching, require_comparable

    runtimes, device, pixels = work.runtimes(), torch.device(work.device), images_sha256(work.images)
    with cudnn_benchmark(device):
        for runtime, dtype, size in grid.cells():
            protocol = {"runtime": runtime, "dtype": dtype, "batch_size": size, "images_sha256": pixels}
            found = matching(before, protocol, then)
            require_comparable(found, conditions_of(device, runtimes[runtime]), protocol, then)


def _print_compared(report: LatencyReport, before: list[LatencyReport], then: str) -> None:
    from jdkd.latency.records import compared, matching

    for line in compared(report, matching(before, report.protocol, then), then):
        print(line)


def _named(folders: list[Path]) -> dict[str, Path]:
    """Folders by names that tell them apart."""
    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in named or [other.resolve().name for other in folders].count(name) > 1:
            name = str(folder)
        repeated = sum(1 for other in named.values() if other == folder)
        named[f"{name} ({repeated + 1})" if repeated else name] = folder
    return named
