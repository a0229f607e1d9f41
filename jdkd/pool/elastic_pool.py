"""The elastic teacher pool: grown from a base detector, trained once, then sampled at no further cost."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jdkd.data import batches
from jdkd.detect import load, parameter_count, save
from jdkd.distill import correlations
from jdkd.errors import InputError, ModelError
from jdkd.files import read_json, write_json
from jdkd.notices import say_once
from jdkd.pool.shrinking import PoolTrainConfig, Progress, calibrate, progressive_shrinking
from jdkd.pool.space import Space, Subnet
from jdkd.pool.supernet import Supernet, grow_base
from jdkd.train import evaluate

POOL = "pool.json"


@dataclass(frozen=True)
class ScoredSubnet:
    """A subnet that was scored: COCO mAP on the images that select, parameters, and 1 - r to the base."""

    subnet: Subnet
    map: float
    parameters: int
    distance: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ScoredSubnet":
        return cls(**{**fields, "subnet": Subnet.from_json(fields["subnet"])})


@dataclass
class TeacherPool:
    """A trained supernet, the data that recalibrates its subnets, and what is known of some of them.

    Args:
        supernet: the shared weights.
        dataset: training images, for recalibration.
        batch_size, seed: of the recalibration.
        device: where teachers live.
        members: the subnets that were scored, best first.
        steps: training steps that the pool took.
        trained_on, scored_on: fingerprints of the training images and of those that the scores are of; None where they
            are not known.
    """

    supernet: Supernet
    dataset: Any
    batch_size: int
    seed: int
    device: torch.device | str
    members: list[ScoredSubnet] = field(default_factory=list)
    steps: int = 0
    trained_on: str | None = None
    scored_on: str | None = None

    @property
    def space(self) -> Space:
        return self.supernet.space

    def teacher(self, subnet: Subnet) -> nn.Module:
        """The subnet as a detector of its own, recalibrated and in evaluation mode."""
        return calibrate(self.supernet.extract(subnet), self.dataset, self.batch_size, self.seed, self.device)

    def score(self, subnet: Subnet, base: nn.Module, selection: Any) -> ScoredSubnet:
        """Measures one subnet; one whose detections are no numbers scores 0, which is said."""
        teacher = self.teacher(subnet)
        probe = batches(selection, batch_size=self.batch_size, steps=2, seed=self.seed, device=self.device)
        distances = correlations(base.to(self.device), teacher, probe).values()
        try:
            score = evaluate(teacher, selection, device=self.device, batch_size=self.batch_size).map
        except ModelError as error:
            say_once(f"teacher {subnet} scores 0: {error}")
            score = 0.0
        return ScoredSubnet(subnet, score, parameter_count(teacher), sum(distances) / len(distances))

    def score_members(
        self, subnets: Sequence[Subnet], base: nn.Module, selection: Any, progress: Progress | None = None
    ) -> None:
        """Scores these subnets, each once, on these images; they become the members, best first."""
        members = []
        for subnet in dict.fromkeys(subnets):
            members.append(self.score(subnet, base, selection))
            if progress:
                progress("pool: scoring", len(members), len(set(subnets)), {"mAP": members[-1].map})
        self.members = sorted(members, key=lambda member: -member.map)
        self.scored_on = selection.fingerprint


def train_pool(
    base: nn.Module,
    dataset: Any,
    selection: Any,
    config: PoolTrainConfig,
    folder: Path | str,
    *,
    space: Space | None = None,
    scored: int = 6,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
) -> TeacherPool:
    """Grows a pool from a base detector and trains it by integrated progressive shrinking.

    Args:
        base: the detector that the students descend from.
        dataset: training images.
        selection: images that scores are taken on; none of them is trained on, nor was the base.
        config: phases and settings.
        folder: where the pool is kept; once finished it holds ``spec.json``, ``weights.safetensors`` and
            ``pool.json``.
        space: depths and widths; by default :meth:`Space.from_base`.
        scored: subnets to score afterwards, the largest and the smallest among them, so that the spread is known.
        device: where to train.
        resume: carry on from what ``folder`` holds; a finished pool is only read.
        progress: told after every step.

    Returns:
        The pool, in memory as on disk.
    """
    folder = Path(folder)
    if resume and (folder / POOL).exists():
        return load_pool(folder, base, dataset, device=device)
    space = space or Space.from_base(base.spec)
    torch.manual_seed(config.train.seed)  # fresh channels of the grown network
    supernet = Supernet(space, grow_base(base, space))
    working = folder / "training"
    progressive_shrinking(supernet, dataset, config, working, device=device, resume=resume, progress=progress)
    steps = sum(config.phase_config(number).steps for number in range(len(config.phases)))
    pool = TeacherPool(supernet, dataset, config.train.batch_size, config.train.seed, device, steps=steps)
    pool.trained_on = dataset.fingerprint
    rng = random.Random(config.train.seed)
    subnets = [space.largest, space.smallest]
    while len(subnets) < scored:
        subnets.append(space.sample(rng))
    pool.score_members(subnets[:scored], base, selection, progress)
    _save_pool(folder, pool)
    shutil.rmtree(working)
    return pool


def load_pool(folder: Path | str, base: nn.Module, dataset: Any, *, device: torch.device | str = "cpu") -> TeacherPool:
    """Reads a finished pool.

    Raises:
        InputError: the folder holds none, or its teachers cannot teach descendants of ``base``.
    """
    folder = Path(folder)
    if not (folder / POOL).is_file():
        raise InputError(
            f"{folder} holds no finished teacher pool: it has no {POOL}; give the pool folder of an earlier search."
        )
    try:
        facts = read_json(folder / POOL, "give the pool folder of an earlier search")
        largest = load(folder, device)
        space = Space.from_json(largest.spec, facts["space"])
        members = [ScoredSubnet.from_json(member) for member in facts["members"]]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder} holds no finished teacher pool ({error}); give the pool folder of an earlier search."
        ) from None
    for name in ("classes", "fpn"):
        ours, theirs = getattr(base.spec, name), getattr(largest.spec, name)
        if ours != theirs:
            raise InputError(
                f"the teacher pool in {folder} has {name} {theirs} and the base {ours}; they must be equal: leave the "
                "pool out and let the search grow one from this base."
            )
    pool = TeacherPool(Supernet(space, largest), dataset, facts["batch_size"], facts["seed"], device, members)
    pool.steps = facts["steps"]
    pool.trained_on, pool.scored_on = facts.get("trained_on"), facts.get("scored_on")
    return pool


def _save_pool(folder: Path, pool: TeacherPool) -> None:
    """``pool.json`` comes last: a folder that has it is whole."""
    save(folder, pool.supernet.model)
    facts = {
        "space": pool.space.to_json(),
        "members": [member.to_json() for member in pool.members],
        "batch_size": pool.batch_size,
        "seed": pool.seed,
        "steps": pool.steps,
        "trained_on": pool.trained_on,
        "scored_on": pool.scored_on,
    }
    write_json(folder / POOL, facts)
