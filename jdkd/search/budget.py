"""How a search spends its training steps: see :func:`plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from jdkd.errors import InputError
from jdkd.search.config import SearchConfig

EPOCHS = 24.0  # default budget: as long as two trainings of the usual 12 epochs
POOL_SHARE = 0.12  # of the budget, for the teacher pool, a step of which took 2.6 times a student's in one search
LEAST_POOL = 6  # steps, one for each pass of its phases
EXPLORING_SHARE = 0.12  # of the rest, for the short trainings that find the architectures
HALVING_SHARE = 0.1  # of the rest, that both finalists of a target are trained before one of them goes on alone
FINALISTS = 2  # for each target
SEGMENTS = 2  # that the one that goes on is trained in; before each, one that is too slow is cut
MOST_CUT = 0.6  # of the latency is left by one generation at least: larger cuts go in several
ROOM = 1.04  # of a target is explored at: brief timings miss by so much, and what is cut too far does not grow again
MARGIN = 0.98  # of a target is aimed at in the end: two long timings of one student have differed by as much
SAFE = 0.99  # of a target: who is slower is cut before being trained on, as there is no way to be faster afterwards


@dataclass(frozen=True)
class Rung:
    """One generation of a search.

    Args:
        aims: the latency ratio to cut to, where it looks for architectures; for each target, where it trains on.
        explores: whether it looks for architectures, or trains on those that were found.
        candidates: for each aim.
        steps: training steps of each candidate.
        trial: whether its two candidates are one student, taught and untaught.
    """

    aims: tuple[float, ...]
    explores: bool
    candidates: int
    steps: int
    trial: bool = False

    @property
    def alone(self) -> bool:
        """Whether one student of each target is trained on, and no other beside it."""
        return self.trial or not (self.explores or self.candidates > 1)

    @property
    def cost(self) -> int:
        return len(self.aims) * self.candidates * self.steps


@dataclass(frozen=True)
class Plan:
    """How the budget is spent.

    Args:
        pool: forward-backward passes of the pool.
        rungs: the generations, in order.
    """

    pool: int
    rungs: tuple[Rung, ...]

    @property
    def exploring(self) -> int:
        """Generations that look for architectures."""
        return sum(rung.explores for rung in self.rungs)

    @property
    def total(self) -> int:
        return self.pool + sum(rung.cost for rung in self.rungs)

    @property
    def lineage(self) -> int:
        """Steps of the longest lineage; the control takes as many as the student's."""
        return sum(rung.steps for rung in self.rungs)

    def __str__(self) -> str:
        count = sum(len(rung.aims) * rung.candidates for rung in self.rungs)
        return (
            f"{self.total} training steps: {self.pool} for the teacher pool, {self.total - self.pool} for {count} "
            f"candidates in {len(self.rungs)} generations, the longest lineage {self.lineage}"
        )


def steps_of(config: SearchConfig, images: int, step_seconds: float | None = None) -> int:
    """The budget in training steps.

    Args:
        config: the search.
        images: number of training images.
        step_seconds: of one step of the base on this machine, where the budget is in minutes.
    """
    if config.steps is not None:
        return config.steps
    if config.minutes is not None:
        return int(60 * config.minutes / cast(float, step_seconds))
    return int((config.epochs or EPOCHS) * images / config.batch_size)


def plan(config: SearchConfig, steps: int) -> Plan:
    """Divides a budget of ``steps`` training steps among the pool and the generations.

    The generations first go down nearly to the targets, latency by latency, with several short trainings each. Then
    every target has its finalists, which are timed at length, cut to it and trained on, and the fitter one alone to the
    end (successive halving, Jamieson & Talwalkar, AISTATS 2016): short trainings for many, long ones for few. Where
    teachers are chosen dynamically, that one is trained both with its teacher and without before the better goes on.
    The shares are our choice.

    Raises:
        InputError: the budget is too small for one step each.
    """
    taught = config.method.teaching in ("dynamic", "fixed", "given")
    pool = 0 if config.teacher_pool or not taught else max(LEAST_POOL, round(POOL_SHARE * steps))
    aims, targets = _path(config), config.targets
    left, kinds = steps - pool, len(config.targets)
    finalists = min(FINALISTS, config.candidates)
    short = int(EXPLORING_SHARE * left / (len(aims) * config.candidates))
    left -= len(aims) * config.candidates * short
    halving = int(HALVING_SHARE * left / kinds) if finalists > 1 else 0
    trial = config.method.teaching == "dynamic"
    alone = (left // kinds - finalists * halving) // (SEGMENTS + trial)
    rungs = [Rung((aim,), True, config.candidates, short) for aim in aims]
    rungs += [Rung(targets, False, finalists, halving)] * (halving > 0)
    rungs += [Rung(targets, False, 1 + trial, alone, trial), Rung(targets, False, 1, alone)]
    if min(rung.steps for rung in rungs) < 1:
        least = math.ceil(pool + 2 * len(aims) * config.candidates / EXPLORING_SHARE)
        raise InputError(
            f"the budget is {steps} steps, too few for a pool and {len(aims)} generations of {config.candidates} "
            f"candidates; give about {least} steps or more{_as_asked(config, least / max(1, steps))}."
        )
    return Plan(pool, tuple(rungs))


def _as_asked(config: SearchConfig, times: float) -> str:
    """So many times a budget, in the unit that it was given in."""
    given = {"epochs": config.epochs, "minutes": config.minutes}
    return "".join(f", {value * times:.2g} {name}" for name, value in given.items() if value is not None)


def _path(config: SearchConfig) -> list[float]:
    """The latency ratios that the generations aim at, in turn, down to a little above the smallest target."""
    path = [1.0]
    for target in config.targets:
        aim = min(ROOM * target, MARGIN)
        count = max(1, math.ceil(math.log(aim / path[-1]) / math.log(MOST_CUT) - 1e-9)) if config.method.gradual else 1
        path += [path[-1] * (aim / path[-1]) ** (i / count) for i in range(1, count + 1)]
    return [aim for before, aim in pairwise(path) if aim < before]
