"""The pairs that PKD was published with, as data: a JSON file each, beside this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jdkd.errors import InputError, one_of_these

RECIPE = ("schedule", "decay", "optimizer", "lr", "weight_decay", "batch_size")


@dataclass(frozen=True)
class Preset:
    """A student, a teacher, and how the one was taught by the other.

    Attributes:
        name: of the pair, teacher first.
        student, teacher: family and backbone, as :func:`jdkd.detect.open_model` takes them.
        loss_weight: of PKD, for each level.
        levels: strides of the levels that are compared.
        schedule, decay: see :func:`jdkd.train.schedule.named_schedule`.
        optimizer, lr, weight_decay, batch_size: see :class:`jdkd.train.TrainConfig`; the batch is of all processes.
        min_size, max_size: of the images, in pixels.
        published: mAP on COCO val2017 of teacher, student and distilled student; None where it is not known.
        source: where that was published.
        differs: in what it is not done here as it was there.
    """

    name: str
    student: str
    teacher: str
    loss_weight: float
    levels: tuple[int, ...]
    schedule: str
    decay: str
    optimizer: str
    lr: float
    weight_decay: float
    batch_size: int
    min_size: int
    max_size: int
    published: Mapping[str, float | None]
    source: str
    differs: tuple[str, ...]

    @property
    def recipe(self) -> dict[str, Any]:
        """The flags of the training: schedule and decay, and what :class:`jdkd.train.TrainConfig` knows.

        The penalty that prepares for pruning is not among what was published.
        """
        return {name: getattr(self, name) for name in RECIPE} | {"gamma_l1": 0.0}

    def __str__(self) -> str:
        known = ", ".join(f"{who} {'not known' if score is None else score}" for who, score in self.published.items())
        return f"{self.name}: published mAP on COCO: {known} ({self.source})"


def preset_names() -> list[str]:
    """The names of the presets."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json"))


def preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        InputError: there is none.
    """
    if name not in preset_names():
        known = preset_names()
        raise InputError(f"preset {name!r} is none of {', '.join(known)}; {one_of_these(name, known)}.")
    fields = json.loads(_folder().joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return Preset(name, **fields | {each: tuple(fields[each]) for each in ("levels", "differs")})


def _folder() -> Any:
    return files("jdkd.presets")
