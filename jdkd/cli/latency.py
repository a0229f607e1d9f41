"""`jdkd latency`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.cli.flags import DataFlags, recorded_split, resolve_device
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import require_file, write_json

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from jdkd.latency import LatencyReport

MODES = {
    "end_to_end": "end to end",
    "model_only": "model only",
    "backbone_replay": "backbone, CUDA graph",
}


@dataclass(frozen=True)
class Latency:
    """Time detectors against each other: interleaved, warm, with the uncertainty of their ratios."""

    base: Path
    """Folder of the detector that the others are compared with."""
    students: tuple[Path, ...]
    """Folders of the others."""
    source: DataFlags = field(default_factory=DataFlags)
    images: tuple[Path, ...] = ()
    """Image files to measure on, instead of validation images."""
    out: Path | None = None
    """JSON file for samples, environment and protocol."""
    count: int = 16
    """Validation images to measure on, at most."""
    rounds: int = 100
    """At least so many rounds; each runs every detector twice."""
    seconds: float = 10.0
    """And at least so long."""
    batch_size: int = 1
    """Images per call."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __call__(self) -> None:
        from rich.console import Console

        from jdkd.detect import load
        from jdkd.latency import fuse_for_inference, measure, profile_cost

        device = resolve_device(self.device)
        if self.count < 1:
            raise InputError(f"--count is {self.count}; measure on at least 1 validation image.")
        if self.out is not None:
            require_file(self.out, "--out")
        folders = _named([self.base, *self.students])
        detectors = {name: load(folder) for name, folder in folders.items()}
        images, origin = self._images()
        with Progress() as progress:
            report = measure(
                {name: fuse_for_inference(model) for name, model in detectors.items()},
                images,
                device=device,
                rounds=self.rounds,
                min_seconds=self.seconds,
                batch_size=self.batch_size,
                progress=progress.task("latency"),
            )
        costs = {name: profile_cost(model, otherwise=tuple(images[0].shape[1:])) for name, model in detectors.items()}
        if self.out is not None:
            cost = {name: {"params": one.params, "gmacs": one.gmacs} for name, one in costs.items()}
            write_json(self.out, {**report.to_json(), "cost": cost, "origin": origin})
        console = Console()
        console.print(_table(report, costs))
        for line in _conditions(report, origin):
            console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _images(self) -> tuple[list[Tensor], str]:
        """Images to measure on, and where they come from."""
        from jdkd.data import CocoDetectionDataset, read_image

        if self.images:
            return [read_image(file) for file in self.images], f"{len(self.images)} image files"
        split = self.source.split("val") if self.source.given else recorded_split(self.base, "val")
        if split is not None:
            with Progress() as progress:
                split = replace(split, strict=self.source.strict)
                dataset = CocoDetectionDataset(split, progress.task("check images"))
            chosen = min(self.count, len(dataset))
            return [dataset[index][0] for index in range(chosen)], f"{chosen} images of {split.images}"
        return _photographs(), (
            "2 sample photographs; NMS works on what a detector finds, so give --data for the cost on your images"
        )


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


def _photographs() -> list[Tensor]:
    """The two photographs that scikit-learn carries, uint8 [3, 427, 640]."""
    import torch
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous() for image in load_sample_images().images]


def _table(report: LatencyReport, costs: dict[str, Any]) -> Table:
    """Percentiles of every detector and mode, and the ratio to the base."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title="Latency per call, ms")
    table.collapse_padding = True
    for heading in ("detector", "mode", "p50", "p90", "p99", "IQR", "ratio (95 %)"):
        left = heading in ("detector", "mode")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "detector")
    for name, model in report.models.items():
        size = f"{costs[name].params / 1e6:.2f} M params, {costs[name].gmacs:.2f} GMACs"
        for place, (mode, latency) in enumerate(model.modes().items()):
            ratio = report.ratio(name, mode=mode)
            figures = [f"{getattr(latency, which):.1f}" for which in ("p50", "p90", "p99", "iqr")]
            compared = f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})" if name != report.base else "1"
            table.add_row((name, size, "")[place], MODES[mode], *figures, compared)
    return table


def _conditions(report: LatencyReport, origin: str) -> list[str]:
    """What the table was measured under."""
    machine, protocol = report.environment, report.protocol
    run, facts = protocol["run"], [model.facts for model in report.models.values()]
    dtypes = "/".join(sorted({dtype for one in facts for dtype in one["dtypes"]}))
    warm = f"{'stable' if run['stable'] else 'NOT stable'} after {run['warmup_seconds']:.1f} s of warm-up"
    lines = [
        f"{machine['device_name']} ({machine['device']}), {machine['threads']} threads, "
        f"torch {machine['torch']}, {dtypes}, {machine['clock']}",
        f"{origin}; batch {protocol['batch_size']}, {run['rounds']} rounds in {run['seconds']:.0f} s, "
        f"interleaved (ABBA), {warm}",
    ]
    if "tf32_convolution" in machine:
        lines.append(f"TF32: convolutions {machine['tf32_convolution']}, matrix products {machine['tf32_matmul']}")
    throttled = [state["throttle_reasons"] for state in (machine["gpu_before"], machine["gpu_after"]) if state]
    if any(throttled):
        lines.append(f"the GPU was throttled (reasons {', '.join(map(hex, throttled))}): compare ratios, not times")
    left = {name: model.facts["batch_norms"] for name, model in report.models.items() if model.facts["batch_norms"]}
    if left:
        lines.append(f"batch norms that could not be folded: {left}")
    return lines
