"""`jdkd train`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, ModelFlags, TrainingFlags
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import content_hash, read_text, write_json
from jdkd.notices import say_once
from jdkd.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from jdkd.data import CocoDetectionDataset
    from jdkd.train import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a base detector and score it on the validation split.

    Several processes: torchrun --nproc-per-node N -m jdkd train ...; --batch-size is of each.
    """

    out: Path
    """Folder for architecture.json, weights.safetensors, train.json, log.jsonl."""
    model: str | None = None
    """Detector of torchvision, family (fcos, with --backbone), package.module:function, or folder of a detector."""
    spec: str | None = None
    """Named spec (faster_rcnn_r18_fpn, also r34, r50, r101), or a JSON file of one; instead of --model."""
    choice: ModelFlags = field(default_factory=ModelFlags)
    source: DataFlags = field(default_factory=DataFlags)
    width: float = 1.0
    """Multiplies the channels of a named spec; of a model, the first share of all channels is kept."""
    depth: float = 1.0
    """Multiplies the blocks of a named spec."""
    fpn: int | None = None
    """Channels of the pyramid, instead of the family's or the multiplied ones."""
    box_head: int | None = None
    """Hidden units of the box head, instead of the family's or the multiplied ones."""
    min_size: int | None = None
    """Short side of the input in pixels [800; ssd: 300, ssdlite: 320]."""
    max_size: int | None = None
    """Longest side of the input in pixels [1333]."""
    max_detections: int | None = None
    """Detections an image that the detector keeps and that are scored [100, torchvision's names: as it has them]."""
    weights: Path | None = None
    """State dict of a backbone or detector to begin with, or DEFAULT, IMAGENET1K_V1, COCO_V1 of torchvision."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Images per step, of each process."""
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
    training: TrainingFlags = field(default_factory=TrainingFlags)

    def __call__(self) -> None:
        with self.training.processes() as device:
            self._run(device)

    def _run(self, device: str) -> None:
        from jdkd.data import batches
        from jdkd.data.splits import whereabouts
        from jdkd.detect import save
        from jdkd.detect.contract import require_learner
        from jdkd.latency import fuse_for_inference
        from jdkd.train import evaluate, fit
        from jdkd.train.distributed import from_first, is_first, processes
        from jdkd.train.inputs import with_targets_of

        splits = self.source.splits()
        if self.choice.norm == "sync" and processes() == 1:
            say_once(
                "norm sync takes statistics over several processes on GPUs, and this is one process on "
                f"{device}, where it does what batch does"
            )
        train, val = _open(splits)
        config = self.training.config(train, **vars(self))
        run = RunFolder(self.out)
        model, weights = self._model(train.classes)
        train = with_targets_of(model, train)
        require_learner(
            model, *next(batches(train, batch_size=min(2, self.batch_size), steps=1, seed=self.training.seed))
        )
        with keeping(run, self.training.kept):
            identity = self._identity(model, weights, config, train, val)
            where = {"data": whereabouts({split.name: split for split in splits}), "device": device}
            record = {"command": ["jdkd", *sys.argv[1:]], "where": where}
            resumed = from_first(lambda: run.begin("train", identity, resume=self.training.resume, **record))
            with Progress() as progress:
                how = {"device": device, "folder": self.out, "resume": resumed}
                report = fit(model, train, config, **how, progress=progress.task("train"))
                if is_first():
                    save(self.out, model)
                scored = {"device": device, "batch_size": self.batch_size, "workers": self.training.workers}
                scored |= {"shared": True, "progress": progress.task("evaluate")}
                scores = evaluate(fuse_for_inference(model), val, **scored)
                if not is_first():  # which writes
                    return
            content = _summary(model, scores, report, val.sizes[0][1:]) | {
                "config": dataclasses.asdict(config),
                "device": device,
            }
            write_json(self.out / "train.json", content)
            run.finish()
        _print(self.out, content, scores.text)

    def _model(self, classes: tuple[str, ...]) -> tuple[nn.Module, Path | None]:
        """The detector to train, for the classes of the data, and the file of the weights that it begins with.

        Raises:
            InputError: it is unknown, or a flag is not for it.
        """
        import torch

        from jdkd.detect import NAMED_SPECS, frozen_like, load_weights, narrowed, weights_file

        torch.manual_seed(self.training.seed)
        if (self.spec is None) == (self.model is None):
            both = "both --spec and --model" if self.spec else "neither --spec nor --model"
            raise InputError(f"{both} given; give one of them, the detector to train.")
        is_spec = self.spec is not None or self.model in NAMED_SPECS
        model = self._of_spec(self.spec or self.model, classes) if is_spec else self._of_name(classes)
        weights = None
        if self.weights is not None:
            weights = weights_file(self.weights, model.architecture)
            is_new = not is_spec and self.choice.norm is None and not Path(self.model).is_dir()
            if is_new and (frozen := frozen_like(model, weights)) is not None:
                model = frozen
            print(f"{self.weights}: {load_weights(model, weights)}")
        if not is_spec and self.width != 1:
            model = narrowed(model, self.width)
        return model, weights

    def _of_spec(self, name: str, classes: tuple[str, ...]) -> nn.Module:
        """A detector of a named spec or of the file of one.

        Raises:
            InputError: the spec is unknown or unreadable, or a flag only fits a named one.
        """
        from jdkd.detect import DetectorSpec, build, named_spec

        for flag in ("backbone", "pyramid"):
            if (value := getattr(self.choice, flag)) is not None:
                raise InputError(f"--{flag} {value} is for --model, and a spec has its own; leave it out.")
        sizes = {name: getattr(self, name) for name in ("min_size", "max_size", "max_detections")}
        given = {name: size for name, size in sizes.items() if size is not None}
        norm = {} if self.choice.norm is None else {"norm": self.choice.norm}
        file = Path(name)
        if not (file.suffix == ".json" or file.is_file()):
            widths = {"width": self.width, "depth": self.depth, "fpn": self.fpn, "box_head": self.box_head}
            return build(named_spec(name, classes, **widths, **given).replace(**norm))
        if (self.width, self.depth) != (1.0, 1.0):
            raise InputError(
                f"--width {self.width:g} and --depth {self.depth:g} multiply a named spec, but --spec is the "
                f"file {file}; change the file or name a spec."
            )
        text = read_text(file, "give --spec a JSON file or a named spec")
        if file.name == "architecture.json":
            raise InputError(f"{file} is of a detector that has weights; give its folder as --model.")
        spec = DetectorSpec.from_json(text, source=str(file))
        if spec.classes != tuple(classes):
            raise InputError(
                f"{file} has the classes {', '.join(spec.classes[:5])} ({len(spec.classes)}), the data "
                f"{', '.join(classes[:5])} ({len(classes)}); give the data's classes to the spec."
            )
        given |= {name: getattr(self, name) for name in ("fpn", "box_head") if getattr(self, name) is not None}
        return build(spec.replace(**given, **norm))

    def _of_name(self, classes: tuple[str, ...]) -> nn.Module:
        """A detector by its name, its function or its folder, for the classes of the data.

        Raises:
            InputError: there is none, or a flag is not for it.
        """
        from jdkd.detect import adapt_classes, open_model
        from jdkd.rewrite import describe

        if self.depth != 1:
            raise InputError(
                f"--depth {self.depth:g} multiplies the blocks of a named spec, and {self.model} has those of its "
                "name; leave it out, or give a backbone with more or fewer."
            )
        own = {name: getattr(self, name) for name in ("box_head", "min_size", "max_size", "max_detections")}
        model = open_model(self.model, classes=len(classes), channels=self.fpn, **own, **vars(self.choice))
        adapt_classes(model, len(classes))
        known = model.architecture
        if known.classes and known.classes != classes and len(known.classes) == len(classes):
            say_once(
                f"{self.model} was made for {', '.join(known.classes)[:80]}; its predictors go on as those of "
                f"{', '.join(classes)[:80]}"
            )
        model.architecture = describe(model, known.builder, known.arguments, classes=classes)
        return model

    def _identity(
        self,
        model: nn.Module,
        weights: Path | None,
        config: TrainConfig,
        train: CocoDetectionDataset,
        val: CocoDetectionDataset,
    ) -> dict[str, Any]:
        """What a resumed training must have in common with the first one."""
        from jdkd.train.config import RESUME_MAY_CHANGE

        training = {name: value for name, value in dataclasses.asdict(config).items() if name not in RESUME_MAY_CHANGE}
        return {
            "architecture": json.loads(model.architecture.to_json()),
            "weights": weights and content_hash(weights),
            "data": {"train": train.fingerprint, "val": val.fingerprint},
            "training": training,
        }


def _open(splits: tuple[Any, Any]) -> tuple[CocoDetectionDataset, CocoDetectionDataset]:
    """Both splits.

    Raises:
        InputError: one cannot be used, or they differ in their classes.
    """
    from jdkd.data import CocoDetectionDataset
    from jdkd.train.distributed import first_goes_ahead

    with Progress() as progress, first_goes_ahead():
        train, val = (CocoDetectionDataset(split, progress.task(f"check {split.name} images")) for split in splits)
    if train.classes != val.classes:
        raise InputError(
            f"the training data have the classes {', '.join(train.classes[:5])} ({len(train.classes)}), the "
            f"validation data {', '.join(val.classes[:5])} ({len(val.classes)}); give splits of one data set."
        )
    return train, val


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


def _print(out: Path, content: dict[str, Any], lines: str) -> None:
    print(lines)
    print(
        f"mAP {content['map']:.3f}, mAP50 {content['map50']:.3f}, {content['params'] / 1e6:.2f} M "
        f"parameters, {content['gmacs']:.2f} GMACs, {content['train_steps']} steps in "
        f"{content['seconds']:.0f} s"
    )
    for name in ("architecture.json", "weights.safetensors", "train.json", "log.jsonl"):
        print(out / name)
