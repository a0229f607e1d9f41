"""What a search is asked to do, and how it spends its training steps."""

import math
from dataclasses import dataclass
from pathlib import Path

from jdkd.data import Split
from jdkd.errors import InputError
from jdkd.train import TrainConfig

POOL_SHARE = 0.36  # of the budget; the rest is three times the lineage: the candidates and the two controls
CANDIDATES = 4
EPOCHS = 36  # default budget: as long as a 3x schedule


@dataclass(frozen=True)
class SearchConfig:
    """The joint search, as asked for.

    Args:
        base: folder of the base detector.
        train, val: the data; everything is trained on all of ``train``.
        selection: images that teachers and students are selected on, while all of ``val`` reports; by default one half
            of ``val`` selects and the other reports (:func:`jdkd.search.selection.divide`).
        out: folder that everything is written to.
        teacher_pool: folder of a finished pool; by default one is grown from the base.
        target_latency: wanted latency over the base's, end to end; 0.53 is what Joint-DetNAS publishes.
        steps: training steps that the search may spend on pool, candidates and controls together, a step being
            one forward and backward pass of one batch; by default 36 epochs of the training images.
        candidates: students to train.
        proposals: students to screen, untrained, for each that is trained.
        batch_size, lr, amp, workers: of every training; ``lr`` is the peak.
        feature_weight, head_weight: of the distillation (Pearson loss per level; class logits).
        resolutions: short sides that students may choose from, over the base's.
        latency_rounds: rounds in which every candidate is timed; those that may be chosen are timed again, in five
            times as many.
        latency_seconds: how long the timing of one that may be chosen lasts at least.
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
    target_latency: float = 0.53
    steps: int | None = None
    candidates: int = CANDIDATES
    proposals: int = 12
    batch_size: int = 8
    lr: float = 1e-3
    amp: str = "auto"
    workers: int = 0
    feature_weight: float = 6.0
    head_weight: float = 0.0
    resolutions: tuple[float, ...] = (0.75, 0.875, 1.0)
    latency_rounds: int = 20
    latency_seconds: float = 10.0
    seed: int = 0
    device: str = "cpu"
    resume: bool = False
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.target_latency <= 1:
            raise InputError(
                f"target_latency is a fraction of the base's latency and must be in (0, 1], got {self.target_latency}."
            )
        for name, least in (("candidates", 1), ("proposals", 1), ("batch_size", 1), ("latency_rounds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("latency_seconds", "feature_weight", "head_weight", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")
        TrainConfig(1, batch_size=self.batch_size, lr=self.lr, amp=self.amp, workers=self.workers)


@dataclass(frozen=True)
class Plan:
    """How the budget is spent.

    Args:
        pool: forward-backward passes of the pool.
        candidates: students to train.
        per_candidate: training steps of each.
    """

    pool: int
    candidates: int
    per_candidate: int

    @property
    def lineage(self) -> int:
        """Steps of a student that descends from all the others; each control takes as many."""
        return self.candidates * self.per_candidate

    @property
    def total(self) -> int:
        return self.pool + 3 * self.lineage

    def __str__(self) -> str:
        return (
            f"{self.total} training steps at most: {self.pool} for the teacher pool, {self.candidates} candidates of "
            f"{self.per_candidate}, and two controls of up to {self.lineage}"
        )


def steps_of(config: SearchConfig, images: int) -> int:
    """The budget in training steps, for so many training images."""
    return config.steps if config.steps is not None else EPOCHS * images // config.batch_size


def plan(config: SearchConfig, images: int) -> Plan:
    """Divides the budget.

    Args:
        config: the search.
        images: number of training images.

    Raises:
        InputError: the budget is too small for one step each.
    """
    steps = steps_of(config, images)
    pool = 0 if config.teacher_pool else round(POOL_SHARE * steps)
    per_candidate = (steps - pool) // (3 * config.candidates)
    if per_candidate < 1 or (pool < 6 and not config.teacher_pool):
        least = (
            3 * config.candidates
            if config.teacher_pool
            else max(18, round(3 * config.candidates / (1 - POOL_SHARE)) + 1)
        )
        raise InputError(
            f"steps is {steps}, too few for a pool, {config.candidates} candidates and their controls; give at least "
            f"{least}."
        )
    return Plan(pool, config.candidates, per_candidate)
