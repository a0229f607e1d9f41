"""The settings of one training, as data."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from jdkd.errors import InputError
from jdkd.ops.integers import integer

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "off", "bf16", "fp16")
# These decide how fast a training runs and what it writes, not what it computes: resuming may change them.
RESUME_MAY_CHANGE = frozenset({"workers", "log_every", "checkpoint_every"})
EARLIER = {"processes": 1, "accumulate": 1, "by_aspect": False}  # what trainings did before it could be chosen


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training computes, together with the model and the data.

    Args:
        steps: optimizer steps.
        batch_size: images of a forward, and of a step where ``accumulate`` is 1.
        accumulate: forwards whose gradients are averaged in a step: one of ``accumulate * batch_size`` images in the
            memory of ``batch_size`` (batch norms see ``batch_size`` images at a time).
        lr: peak learning rate of the cycle.
        optimizer: ``"adamw"`` (Loshchilov and Hutter, ICLR 2019) or ``"sgd"`` with momentum.
        momentum: of SGD; AdamW keeps its usual betas.
        weight_decay: for weights alone; norms and biases are not decayed.
        warmup: fraction of the cycle over which the rate rises linearly to ``lr``.
        lr_end: fraction of ``lr`` at which the cosine ends.
        milestones: fractions of the cycle at which the rate falls to a tenth, in place of the cosine; see
            :func:`jdkd.train.schedule.named_schedule`.
        cycle_start, cycle_steps: where in a longer cycle of ``cycle_steps`` steps this training begins, so
            that several trainings of one lineage can share one cycle; by default each is a whole cycle.
        clip: largest norm of all gradients together; 0 does not clip.
        gamma_l1: strength of the L1 penalty on the scales of the batch norms, as a subgradient (network
            slimming, Liu et al., ICCV 2017, uses 1e-5 and up); 0 does without.
        amp: ``"bf16"``, ``"fp16"`` (with loss scaling), ``"off"``, or ``"auto"``: the best one the GPU knows,
            off on a CPU.
        flip: probability of a horizontal flip.
        by_aspect: let the images of a step all be landscape or all portrait, where there are enough of both, so that
            little of a batch is padding.
        sizes: short sides in pixels, one of which each image is resized to while training, in place of the detector's
            own.
        ema: decay of a running average of weights and buffers, which the detector has in the end; it begins lower, at
            most (1 + step) / (10 + step), so that the first weights are forgotten in short trainings too.
        seed: decides the order of the images, the flips and the sampling of regions.
        workers: processes that read images.
        log_every, checkpoint_every: steps between log lines and between checkpoints (0: only at the end).

    Raises:
        InputError: a setting is out of range.
    """

    steps: int
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-3
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 1e-2
    warmup: float = 0.1
    lr_end: float = 0.01
    milestones: tuple[float, ...] | None = None
    cycle_start: int = 0
    cycle_steps: int | None = None
    clip: float = 10.0
    gamma_l1: float = 1e-5
    amp: str = "auto"
    flip: float = 0.0
    by_aspect: bool = True
    sizes: tuple[int, ...] | None = None
    ema: float | None = None
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not (value := getattr(self, name)) >= least or not math.isfinite(value):
                raise InputError(f"{name} must be a number of at least {least}, got {value}.")
            if isinstance(least, int):
                if (whole := integer(value)) is None:
                    raise InputError(f"{name} must be a whole number, got {value}; round it.")
                object.__setattr__(self, name, whole)
        if self.seed >= 2**64:
            raise InputError(f"seed must be below 2**64, got {self.seed}.")
        for name in ("milestones", "sizes"):  # JSON has lists
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(given) or None)
        for name in ("warmup", "lr_end", "momentum", "flip", "ema"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise InputError(f"{name} is a fraction and must be in 0..1, got {value}.")
        marks = self.milestones or ()
        if list(marks) != sorted(set(marks)) or not all(0 < mark < 1 for mark in marks):
            raise InputError(f"milestones must be fractions of the cycle in 0..1 that rise, got {list(marks)}.")
        if not all(type(size) is int and size > 0 for size in self.sizes or ()):
            raise InputError(f"sizes must be whole numbers of pixels of at least 1, got {list(self.sizes or ())}.")
        for name, choices in (("optimizer", OPTIMIZERS), ("amp", PRECISIONS)):
            if (choice := getattr(self, name)) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {choice!r}.")
        if self.cycle_steps is not None and self.cycle_start + self.steps > self.cycle_steps:
            raise InputError(
                f"cycle_steps is {self.cycle_steps}, but steps {self.cycle_start} to "
                f"{self.cycle_start + self.steps} of it are asked for; give a longer cycle or fewer steps."
            )

    def identity(self) -> dict[str, Any]:
        """What a resumed training must have in common with the first one."""
        return {name: value for name, value in asdict(self).items() if name not in RESUME_MAY_CHANGE}

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0): a linear rise to ``lr``, then a cosine to ``lr * lr_end``, or steps.

        Warm-up as in Goyal et al. 2017, cosine as in Loshchilov and Hutter, ICLR 2017.
        """
        step, total = step + self.cycle_start, self.cycle_steps or self.steps
        rising = round(self.warmup * total)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        if self.milestones:
            return self.lr * 0.1 ** sum(step >= round(mark * total) for mark in self.milestones)
        progress = (step - rising) / max(1, total - 1 - rising)
        return self.lr * (self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


_LEAST = {
    "steps": 0,
    "batch_size": 1,
    "accumulate": 1,
    "lr": 0.0,
    "weight_decay": 0.0,
    "cycle_start": 0,
    "clip": 0.0,
    "gamma_l1": 0.0,
    "seed": 0,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 0,
}
