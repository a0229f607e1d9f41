"""`jdkd train`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, resolve_device
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import content_hash, read_text, write_json
from jdkd.run_folder import RunFolder

if TYPE_CHECKING:
    from jdkd.data import CocoDetectionDataset
    from jdkd.detect import DetectorSpec
    from jdkd.train import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a base detector and score it on the validation split."""

    spec: str
    """Named spec (faster_rcnn_r18_fpn, also r34, r50, r101), or a JSON file."""
    out: Path
    """Folder for spec.json, weights.safetensors, train.json, log.jsonl."""
    source: DataFlags = field(default_factory=DataFlags)
    width: float = 1.0
    """Multiplies the channels of a named spec."""
    depth: float = 1.0
    """Multiplies the blocks of a named spec."""
    fpn: int | None = None
    """Channels of the FPN, instead of the multiplied ones."""
    box_head: int | None = None
    """Hidden units of the box head, instead of the multiplied ones."""
    min_size: int | None = None
    """Short side of the input in pixels [named spec: 800]."""
    max_size: int | None = None
    """Longest side of the input in pixels [named spec: 1333]."""
    max_detections: int | None = None
    """Detections an image that the detector keeps and that are scored [named spec: 100]."""
    weights: Path | None = None
    """State dict of a torchvision backbone or detector to begin with."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Images per step."""
    lr: float = 2e-3
    """Peak learning rate of the one cycle."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    weight_decay: float = 1e-2
    """Of weights; norms and biases are not decayed."""
    warmup: float = 0.1
    """Fraction of the steps over which the rate rises."""
    clip: float = 10.0
    """Largest norm of the gradients; 0 does not clip."""
    gamma_l1: float = 1e-5
    """L1 penalty on the scales of batch norms, which prepares for pruning."""
    flip: float | None = None
    """Probability of a horizontal flip [0.5, or 0 where the data say that a mirrored object is another]."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: on a GPU."""
    seed: int = 0
    """Of weights, order of images and sampling."""
    workers: int = 0
    """Processes that read images."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Carry on what OUT holds."""

    def __call__(self) -> None:
        import torch

        from jdkd.data.splits import whereabouts
        from jdkd.detect import build, load_weights, save
        from jdkd.latency import deployable
        from jdkd.train import evaluate, fit

        device, splits = resolve_device(self.device), self.source.splits()
        train, val = _open(splits)
        spec, config = self._spec(train.classes), self._config(train)
        run = RunFolder(self.out)
        with keeping(run, f"the checkpoint of every {self.checkpoint_every} steps and of the last one"):
            identity = self._identity(spec, config, train, val)
            where = {"data": whereabouts({split.name: split for split in splits}), "device": device}
            record = {"command": ["jdkd", *sys.argv[1:]], "where": where}
            resumed = run.begin("train", identity, resume=self.resume, **record)
            torch.manual_seed(self.seed)
            model = build(spec)
            if self.weights is not None:
                print(f"{self.weights}: {load_weights(model, self.weights)}")
            with Progress() as progress:
                how = {"device": device, "folder": self.out, "resume": resumed}
                report = fit(model, train, config, **how, progress=progress.task("train"))
                save(self.out, model)
                scored = {"device": device, "batch_size": self.batch_size, "workers": self.workers}
                scores = evaluate(deployable(model), val, **scored, progress=progress.task("evaluate"))
            content = _summary(model, scores, report) | {
                "config": dataclasses.asdict(config),
                "device": device,
            }
            write_json(self.out / "train.json", content)
            run.finish()
        _print(self.out, content, scores.text)

    def _spec(self, classes: tuple[str, ...]) -> DetectorSpec:
        """The detector to build, for the classes of the data.

        Raises:
            InputError: the spec is unknown or unreadable, or a flag only fits a named one.
        """
        from jdkd.detect import DetectorSpec, named_spec
        from jdkd.detect.checkpoint import ARCHITECTURE

        sizes = {name: getattr(self, name) for name in ("min_size", "max_size", "max_detections")}
        given = {name: size for name, size in sizes.items() if size is not None}
        file = Path(self.spec)
        if not (file.suffix == ".json" or file.is_file()):
            widths = {"width": self.width, "depth": self.depth, "fpn": self.fpn, "box_head": self.box_head}
            return named_spec(self.spec, classes, **widths, **given)
        if (self.width, self.depth) != (1.0, 1.0):
            raise InputError(
                f"--width {self.width:g} and --depth {self.depth:g} multiply a named spec, but --spec is the "
                f"file {file}; change the file or name a spec."
            )
        text = read_text(file, "give --spec a JSON file or a named spec")
        if file.name == ARCHITECTURE:
            raise InputError(f"{file} is of a builder, and train takes a spec so far; give a named one or a spec.json.")
        spec = DetectorSpec.from_json(text, source=str(file))
        if spec.classes != tuple(classes):
            raise InputError(
                f"{file} has the classes {', '.join(spec.classes[:5])} ({len(spec.classes)}), the data "
                f"{', '.join(classes[:5])} ({len(classes)}); give the data's classes to the spec."
            )
        given |= {name: getattr(self, name) for name in ("fpn", "box_head") if getattr(self, name) is not None}
        return spec.replace(**given)

    def _config(self, train: CocoDetectionDataset) -> TrainConfig:
        from jdkd.train import TrainConfig

        flip = self.flip if self.flip is not None else 0.5 * train.mirror_symmetric
        names = {field.name for field in dataclasses.fields(TrainConfig)} & vars(self).keys()
        return TrainConfig(**{**{name: getattr(self, name) for name in names}, "flip": flip})

    def _identity(
        self, spec: DetectorSpec, config: TrainConfig, train: CocoDetectionDataset, val: CocoDetectionDataset
    ) -> dict[str, Any]:
        """What a resumed training must have in common with the first one."""
        from jdkd.train.config import RESUME_MAY_CHANGE

        training = {name: value for name, value in dataclasses.asdict(config).items() if name not in RESUME_MAY_CHANGE}
        return {
            "spec": json.loads(spec.to_json()),
            "weights": self.weights and content_hash(self.weights),
            "data": {"train": train.fingerprint, "val": val.fingerprint},
            "training": training,
        }


def _open(splits: tuple[Any, Any]) -> tuple[CocoDetectionDataset, CocoDetectionDataset]:
    """Both splits.

    Raises:
        InputError: one cannot be used, or they differ in their classes.
    """
    from jdkd.data import CocoDetectionDataset

    with Progress() as progress:
        train, val = (CocoDetectionDataset(split, progress.task(f"check {split.name} images")) for split in splits)
    if train.classes != val.classes:
        raise InputError(
            f"the training data have the classes {', '.join(train.classes[:5])} ({len(train.classes)}), the "
            f"validation data {', '.join(val.classes[:5])} ({len(val.classes)}); give splits of one data set."
        )
    return train, val


def _summary(model: Any, scores: Any, report: Any) -> dict[str, Any]:
    """Scores, cost and what the training took, JSON-able."""
    from jdkd.latency import count

    cost = count(model)
    return {
        **scores.numbers,
        "params": cost.params,
        "gmacs": cost.gmacs,
        "spec": model.spec.id,
        "train_steps": report.steps,
        "seconds": report.seconds,
        "losses": report.losses,
    }


def _print(out: Path, content: dict[str, Any], lines: str) -> None:
    print(lines)
    print(
        f"mAP {content['map']:.3f}, mAP50 {content['map50']:.3f}, {content['params'] / 1e6:.2f} M "
        f"parameters, {content['gmacs']:.2f} GMACs, {content['train_steps']} steps in "
        f"{content['seconds']:.0f} s"
    )
    for name in ("spec.json", "weights.safetensors", "train.json", "log.jsonl"):
        print(out / name)
