"""What a search is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from jdkd.data import Split
from jdkd.errors import InputError
from jdkd.morph.importance import CRITERIA
from jdkd.train import TrainConfig

POOL = "pool"  # folder of the one that a search grows, in its own
LONGEST = 1e9  # steps, epochs or minutes: what is more is a slip
LARGEST_SEED = 2**48  # trainings are told apart by a thousand times it and more, in 64 bits

TEACHING = ("dynamic", "fixed", "given", "base", "none")
IMITATION = ("pearson", "mse")
ORDERS = ("joint", "pipelined")


@dataclass(frozen=True)
class Method:
    """What of the method is on, for ablations; the defaults are the method.

    Args:
        order: ``"joint"``, or ``"pipelined"``: first an architecture, then one cut, then distillation.
        inherit: whether a child keeps its parent's weights, or begins with fresh ones.
        teaching: ``"dynamic"`` (the teacher that matches, or none where a student does better without), ``"fixed"``
            (the best throughout), ``"given"`` (the best of the detectors of another make that are given; the pool is
            there all the same), ``"base"`` or ``"none"``.
        imitation: ``"pearson"`` (PKD) or ``"mse"`` (FitNets).
        criterion: by which channels are cut, one of :data:`jdkd.morph.importance.CRITERIA`.
        relative: whether importance is of each loss over its own size, or of their sum as it is; by default the former
            where the base knows its training images by heart, see :attr:`jdkd.search.context.SearchContext.relative`.
        gradual: whether large cuts go in several generations.
    """

    order: str = "joint"
    inherit: bool = True
    teaching: str = "dynamic"
    imitation: str = "pearson"
    criterion: str = "taylor"
    relative: bool | None = None
    gradual: bool = True

    def __post_init__(self) -> None:
        known = {"order": ORDERS, "teaching": TEACHING, "imitation": IMITATION, "criterion": CRITERIA}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(choices)}.")


@dataclass(frozen=True)
class SearchConfig:
    """The joint search, as asked for.

    Args:
        base: folder of the base detector.
        train, val: the data; everything is trained on all of ``train``. Relative paths are made absolute, as workers of
            a cluster run elsewhere, and a report is written from anywhere.
        selection: images that teachers and students are selected on, while all of ``val`` reports; by default one half
            of ``val`` selects and the other reports (:func:`jdkd.search.selection.divide`).
        out: folder that everything is written to.
        teacher_pool: folder of a finished pool; by default one is grown from the base.
        teachers: folders of other detectors of the same classes, members of the pool.
        targets: wanted latencies over the base's, end to end, a student for each; 0.53 is what Joint-DetNAS publishes.
        target_map: where given, the student is the fastest that reaches this mAP on the images that select; where none
            does that may meet the target latency, the best of those that may.
        steps: training steps that pool and candidates may take together, a step being one forward and backward pass
            of one batch.
        epochs: the same in epochs of the training images; 24 where nothing is given.
        minutes: the same in minutes of training on this machine, by the time of a few steps of the base.
        candidates: students to train in each generation that looks for an architecture.
        proposals: students to screen, untrained, for each such generation.
        batch_size, lr, amp, loaders: of every training; ``lr`` is the peak, ``loaders`` are processes that read images.
        train_sizes: short sides in pixels, one of which each image of a training is resized to, of pool, candidates and
            control; for a student of another input size in proportion. None: as the base was trained, where its folder
            says so; empty: each at its own input size.
        workers: processes that train candidates at once; 0 and 1 train in this one.
        ray: address of a Ray cluster that trains them instead, or ``"auto"``.
        control: whether the base is trained as long as a student's lineage, to be compared with.
        feature_weight, head_weight: of the distillation (Pearson loss per level; class logits).
        resolutions: short sides that students may choose from, over the base's.
        runtime: what will run the students, and runs them when they are timed: `eager`, `compile`, `cudagraph`,
            `onnxruntime`, `openvino` or `tensorrt`, those that take a file as :mod:`jdkd.export` writes it.
        latency_rounds: rounds in which every candidate is timed; those that are to be trained on, and those that may
            be chosen in the end, are timed again, in five times as many.
        latency_seconds: how long such a timing lasts at least.
        method: what of the method is on.
        seed: decides everything that is drawn.
        device: where to run.
        resume: carry on from what ``out`` holds.
        command: how the search was called, for the record.

    Raises:
        InputError: a setting is out of range.
    """

    base: Path
    train: Split
    val: Split
    out: Path
    selection: Split | None = None
    teacher_pool: Path | None = None
    teachers: tuple[Path, ...] = ()
    targets: tuple[float, ...] = (0.53,)
    target_map: float | None = None
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    candidates: int = 3
    proposals: int = 8
    batch_size: int = 8
    lr: float = 2e-3
    amp: str = "auto"
    loaders: int = 0
    train_sizes: tuple[int, ...] | None = None
    workers: int = 0
    ray: str | None = None
    control: bool = True
    feature_weight: float = 2.0
    head_weight: float = 0.0
    resolutions: tuple[float, ...] = (0.75, 0.875, 1.0)
    runtime: str = "eager"
    latency_rounds: int = 20
    latency_seconds: float = 10.0
    method: Method = field(default_factory=Method)
    seed: int = 0
    device: str = "cpu"
    resume: bool = False
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("train", "val", "selection"):
            if (split := getattr(self, name)) is not None:
                lies = {"images": split.images.absolute(), "annotations": split.annotations.absolute()}
                object.__setattr__(self, name, replace(split, **lies))
        if not self.targets or not all(0 < target <= 1 for target in self.targets):
            raise InputError(
                f"targets are fractions of the base's latency, at least one, each in (0, 1], got {list(self.targets)}; "
                "give 0.53 for 53 %."
            )
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets), reverse=True)))
        if len(named := {f"{target:g}" for target in self.targets}) < len(self.targets):  # folders are named so
            raise InputError(
                f"targets are {list(self.targets)}, of which some are the same in six digits; give {len(named)} "
                f"that differ, as {', '.join(sorted(named, reverse=True))}."
            )
        if self.target_map is not None and not 0 < self.target_map < 1:
            raise InputError(f"target_map is an mAP and must be in (0, 1), got {self.target_map}.")
        budgets = {name: getattr(self, name) for name in ("steps", "epochs", "minutes")}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given; give the budget in one of steps, epochs and minutes.")
        for name, value in given.items():
            if not 0 < value <= LONGEST:
                raise InputError(f"{name} must be a number above 0, at most {LONGEST:g}, got {value}.")
        for name, least in (("candidates", 1), ("proposals", 1), ("batch_size", 1), ("latency_rounds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("latency_seconds", "feature_weight", "head_weight", "seed", "workers", "loaders"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")
        if self.seed > LARGEST_SEED:
            raise InputError(f"seed must be at most {LARGEST_SEED}, got {self.seed}.")
        if self.method.teaching == "given" and not self.teachers:
            raise InputError("teaching is 'given', and no teachers are; give their folders, or teach otherwise.")
        if self.workers and self.ray is not None:
            raise InputError("workers and ray are both given; the candidates are trained by one of them.")
        sizes = self.train_sizes or None
        TrainConfig(1, batch_size=self.batch_size, lr=self.lr, amp=self.amp, workers=self.loaders, sizes=sizes)

    @property
    def pool(self) -> Path:
        """Folder of the teacher pool, given or grown."""
        return self.teacher_pool or self.out / POOL
