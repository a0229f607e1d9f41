"""What several commands share: where the data are, where to run, what is recorded of a run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdkd.errors import InputError
from jdkd.notices import say_once

if TYPE_CHECKING:
    from jdkd.data import CocoDetectionDataset, Split
    from jdkd.train import TrainConfig


@dataclass(frozen=True)
class DataFlags:
    """Where images and annotations are."""

    data: Path | None = None
    """Folder in the COCO layout: annotations/instances_{train,val}2017.json, train2017, val2017."""
    train_images: Path | None = None
    """Folder of the training images, for any other layout."""
    train_annotations: Path | None = None
    """COCO annotations of the training images."""
    val_images: Path | None = None
    """Folder of the validation images."""
    val_annotations: Path | None = None
    """COCO annotations of the validation images."""
    strict: bool = False
    """Refuse boxes without area or over the edge of their image, instead of leaving them out or cutting them."""

    @property
    def given(self) -> bool:
        """Whether any of the flags that name data was given."""
        return any(value is not None for name, value in vars(self).items() if name != "strict")

    def names(self, split: str) -> bool:
        """Whether any of the flags that name a split, `train` or `val`, was given."""
        return any(getattr(self, flag) is not None for flag in ("data", f"{split}_images", f"{split}_annotations"))

    def splits(self) -> tuple[Split, Split]:
        """The training and the validation split.

        Raises:
            InputError: something is not given or does not exist.
        """
        from jdkd.data import resolve_splits

        return resolve_splits(**vars(self))

    def split(self, name: str) -> Split:
        """One split, `train` or `val`.

        Raises:
            InputError: it is not given or does not exist.
        """
        from jdkd.data import resolve_split

        images, annotations = getattr(self, f"{name}_images"), getattr(self, f"{name}_annotations")
        return resolve_split(name, self.data, images, annotations, self.strict)


@dataclass(frozen=True)
class ModelFlags:
    """What of a model that is named by its family or by torchvision can be chosen."""

    backbone: str | None = None
    """Backbone of torchvision (resnet18, mobilenet_v2, swin_t, ...) or timm:NAME, instead of the name's own."""
    pyramid: str | None = None
    """P2-P6 or P3-P7 [as the family has it]."""
    norm: str | None = None
    """batch, frozen, sync or group [as the backbone has it]."""


@dataclass(frozen=True)
class TrainingFlags:
    """How and where a command trains."""

    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: on a GPU."""
    seed: int = 0
    """Decides everything that is drawn."""
    accumulate: int = 1
    """Batches whose gradients are averaged in a step: memory of one, images of all."""
    by_aspect: bool = True
    """Batches of landscape or of portrait images alone, where there are enough of both: less padding."""
    workers: int = 0
    """Processes that read images."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0: only at the end, and on Ctrl-C."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Carry on what OUT holds; torchrun's restarts do so by themselves."""

    def __post_init__(self) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            object.__setattr__(self, "resume", True)

    def kept(self, folder: Path) -> str:
        """What of an interrupted training is kept in its folder, in words."""
        from jdkd.train.checkpoint import CHECKPOINT

        if not any(folder.rglob(CHECKPOINT)):
            return "no checkpoint yet, so that it begins anew"
        every = self.checkpoint_every
        return f"the checkpoint of every {every} steps and of the last one" if every else "the last checkpoint"

    @contextmanager
    def processes(self) -> Iterator[str]:
        """Joins the processes that torchrun started; yields the device of this one."""
        from jdkd.train.distributed import process_group

        with process_group(resolve_device(self.device)) as device:
            yield device

    def config(self, train: CocoDetectionDataset | None, **settings: Any) -> TrainConfig:
        """Settings of a training.

        Args:
            train: the training images; by default they are mirrored where they may be. None where they are not read yet
                and the settings are looked at alone.
            settings: those that are no flags here; what is no setting of a training is left out.
        """
        from jdkd.train import TrainConfig

        known = {field.name for field in fields(TrainConfig)}
        given = {name: value for name, value in (vars(self) | settings).items() if name in known and value is not None}
        return TrainConfig(**{"flip": 0.5 * (train is None or train.mirror_symmetric)} | given)


@dataclass(frozen=True)
class RecipeFlags:
    """How one detector is trained, and how long; in brackets what holds where nothing is said."""

    steps: int | None = None
    """Optimizer steps [1000]."""
    schedule: Literal["1x", "2x", "3x"] | None = None
    """12, 24 or 36 epochs instead of --steps, with 500 steps of warm-up and --decay step."""
    decay: Literal["cosine", "step"] | None = None
    """How the rate falls: along a cosine, or to a tenth after 2/3 and again after 11/12 of the steps [cosine]."""
    batch_size: int | None = None
    """Images per step, of each process [8]."""
    lr: float | None = None
    """Peak learning rate of the one cycle [0.002]."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """AdamW, or SGD with momentum [adamw]."""
    weight_decay: float | None = None
    """Of weights; norms and biases are not decayed [0.01]."""
    warmup: float | None = None
    """Fraction of the steps over which the rate rises [0.1]."""
    clip: float | None = None
    """Largest norm of the gradients; 0 does not clip [10]."""
    gamma_l1: float | None = None
    """L1 penalty on the scales of batch norms, which prepares for pruning [1e-5]."""
    flip: float | None = None
    """Probability of a horizontal flip [0.5, or 0 where the data say that a mirrored object is another]."""
    train_sizes: tuple[int, ...] = ()
    """Short sides in pixels, one of which each image is resized to while training [--min-size]."""
    ema: float | None = None
    """Decay of a running average of the weights, which is what is saved and scored; such as 0.999 [none]."""
    tensorboard: bool = False
    """Write TensorBoard events to OUT/tensorboard as the training goes."""

    def settings(self, images: int, accumulate: int = 1) -> dict[str, Any]:
        """What of these is a setting of a training on so many images, of so many batches a step.

        Raises:
            InputError: the length is given twice.
        """
        from jdkd.train.distributed import processes
        from jdkd.train.schedule import milestones_of, named_schedule

        if self.steps is not None and self.schedule is not None:
            raise InputError(f"--steps {self.steps} and --schedule {self.schedule} are both given; give one of them.")
        batch_size = 8 if self.batch_size is None else self.batch_size
        if self.schedule is None:
            known = {"steps": 1000, "milestones": milestones_of(self.decay or "cosine")}
        else:
            at_once = max(1, batch_size) * processes() * max(1, accumulate)
            known = named_schedule(self.schedule, images, at_once, self.decay or "step")
        given = {name: value for name, value in vars(self).items() if value is not None}
        return known | given | {"sizes": self.train_sizes or None}


def resolve_device(device: str) -> str:
    """The device to run on.

    Args:
        device: `auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Returns:
        `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: it is none of these, or that GPU is not there.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device is {device!r}; give auto, cpu, cuda or cuda:N.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if there else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= there:
        raise InputError(
            f"--device is {device}, but torch {torch.__version__} sees {there} CUDA devices; give --device auto or cpu."
        )
    return device


def split_of(source: DataFlags, folder: Path, name: str) -> Split:
    """The split, `train` or `val`, that the flags name, or else the one that a run recorded, which is said.

    Args:
        source: the flags.
        folder: of the run, or one in it.
        name: of the split.

    Raises:
        InputError: it is not given or does not exist, and the folder does not know of one either.
    """
    found = None if source.given else recorded_split(folder, name, source.strict)
    if found is None:
        return source.split(name)
    say_once(f"no data are given: these are the {name} images that {folder} was made with, in {found.images}")
    return found


def record_of(splits: Sequence[Split], device: str) -> dict[str, Any]:
    """What :meth:`jdkd.run_folder.RunFolder.begin` records of a command: how it was called, where its data are."""
    from jdkd.data.splits import whereabouts

    where = {"data": whereabouts({split.name: split for split in splits}), "device": device}
    return {"command": ["jdkd", *sys.argv[1:]], "where": where}


def recorded_split(folder: Path, name: str, strict: bool) -> Split | None:
    """The split, `train` or `val`, that a run recorded, if it is still there.

    Args:
        folder: of the run, or one in it, such as its student or its pool.
        name: of the split.
        strict: whether to refuse what would be put right.
    """
    from jdkd.data import Split
    from jdkd.run_folder import RunFolder

    for place in (folder, folder.resolve().parent):
        try:
            data = (RunFolder(place).read() or {"where": {}})["where"].get("data", {})
        except InputError:  # a file of that name that something else wrote says nothing of data
            continue
        if not {f"{name}_images", f"{name}_annotations"} <= data.keys():
            continue
        split = Split(Path(data[f"{name}_images"]), Path(data[f"{name}_annotations"]), name, strict)
        if split.images.is_dir() and split.annotations.is_file():
            return split
    return None
