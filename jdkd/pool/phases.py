"""The phases of a pool's training, as data: what is open in each, and what a step of it trains."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.files import read_json
from jdkd.train import TrainConfig


@dataclass(frozen=True)
class Phase:
    """One phase of the shrinking; every step of it trains the largest network.

    Args:
        name: what the log calls it.
        share: of the pool's forward-backward passes.
        top_fraction: upper share of every range that subnets are drawn from (0: the largest network alone).
        subnets: drawn at random in every step, besides the largest network.
        lr: peak learning rate, relative to the pool's.
        sandwich: train the smallest that is open in every step too, so that what is drawn lies between two that always
            learn (the sandwich rule of Yu and Huang, ICCV 2019, and BigNAS, Yu et al., ECCV 2020).

    Raises:
        InputError: a field is out of range.
    """

    name: str
    share: float
    top_fraction: float
    subnets: int
    lr: float
    sandwich: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise InputError(f"a phase is named {self.name!r}; give it a name of letters, digits, - and _.")
        for field, (what, holds) in _RANGES.items():
            value = getattr(self, field)
            is_number = isinstance(value, int | float) and (field == "sandwich") == isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not holds(value):
                raise InputError(f"phase {self.name} has {field} {value!r}; give {what}.")

    @property
    def passes(self) -> int:
        """Forward-backward passes of one step."""
        return 1 + self.subnets + self.sandwich


_RANGES = {
    "share": ("a number above 0 and up to 1", lambda value: 0 < value <= 1),
    "top_fraction": ("a number in 0..1", lambda value: 0 <= value <= 1),
    "subnets": ("a whole number of at least 0", lambda value: isinstance(value, int) and value >= 0),
    "lr": ("a number of at least 0", lambda value: value >= 0),
    "sandwich": ("true or false", lambda value: True),
}

PHASES = (
    Phase("largest", share=0.70, top_fraction=0.0, subnets=0, lr=1.0),
    Phase("middle", share=0.15, top_fraction=0.5, subnets=1, lr=0.4),
    Phase("full", share=0.15, top_fraction=1.0, subnets=1, lr=0.4),
)
"""The phases of a pool's training where no others are given: progressive shrinking."""


def require_phases(phases: Sequence[Phase], source: str = "phases") -> None:
    """Refuses phases that make no training.

    Raises:
        InputError: there is none, two have one name, or their shares are not 1 together.
    """
    names = [phase.name for phase in phases]
    if not names:
        raise InputError(f"{source} holds no phase; give at least one.")
    if len(set(names)) < len(names):
        raise InputError(f"{source} has the names {', '.join(names)}; give every phase a name of its own.")
    if abs((total := sum(phase.share for phase in phases)) - 1) > 1e-3:
        raise InputError(f"{source} has shares that are {total:g} together; let them be 1.")


def read_phases(file: Path) -> tuple[Phase, ...]:
    """The phases in a JSON file: a list of objects with the fields of :class:`Phase`.

    Raises:
        InputError: the file cannot be read or does not hold such a list; names file, phase and field.
    """
    own = fields(Phase)
    known = [field.name for field in own]
    remedy = f"give a list of objects with {', '.join(known[:-1])} and, where wanted, {known[-1]}"
    content = read_json(file, remedy)
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise InputError(f"{file} holds no list of phases; {remedy}.")
    for number, one in enumerate(content, start=1):
        if strange := [name for name in one if name not in known]:
            raise InputError(f"phase {number} of {file} has the unknown field {strange[0]!r}; {remedy}.")
        if missing := [name for name in known[:-1] if name not in one]:
            raise InputError(f"phase {number} of {file} has no {missing[0]}; {remedy}.")
    try:
        phases = tuple(Phase(**one) for one in content)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    require_phases(phases, str(file))
    return phases


@dataclass(frozen=True)
class PoolTrainConfig:
    """How a pool is trained.

    Args:
        train: settings of the phases; ``steps`` counts the forward-backward passes of all phases together (a
            step of a phase takes one for the largest network and one for each subnet), ``lr`` is scaled by phase.
        phases: in order.
        feature_weight, head_weight: of distilling the subnets from the frozen largest network.

    Raises:
        InputError: the phases make no training, or a weight is below 0.
    """

    train: TrainConfig
    phases: tuple[Phase, ...] = PHASES
    feature_weight: float = 6.0
    head_weight: float = 1.0

    def __post_init__(self) -> None:
        require_phases(self.phases)
        for name in ("feature_weight", "head_weight"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be a number of at least 0, got {value}.")

    def phase_config(self, number: int) -> TrainConfig:
        """Settings of phase ``number`` (from 0)."""
        phase = self.phases[number]
        steps = max(1, round(phase.share * self.train.steps / phase.passes))
        return replace(self.train, steps=steps, lr=phase.lr * self.train.lr, seed=self.train.seed + 1 + number)

    @property
    def passes(self) -> int:
        """Forward-backward passes of all phases, which are ``train.steps`` but for what phases round."""
        return sum(self.phase_config(number).steps * phase.passes for number, phase in enumerate(self.phases))

    def identity(self) -> dict[str, Any]:
        """What a resumed training must have in common with the first one, besides the settings of its phases."""
        phases = {phase.name: asdict(phase) for phase in self.phases}
        order = [*phases]  # by itself, as that of an object's keys is not compared
        weights = {"feature_weight": self.feature_weight, "head_weight": self.head_weight}
        return {"phases": phases, "phase_order": order, **weights}
