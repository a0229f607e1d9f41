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
from jdkd.detect import load, parameter_count, read, save
from jdkd.detect.contract import architecture_of
from jdkd.distill import correlations
from jdkd.errors import InputError, ModelError
from jdkd.files import read_json, write_json
from jdkd.graph import Topology
from jdkd.notices import say_once
from jdkd.pool.shrinking import PoolTrainConfig, ProgressCallback, calibrate, progressive_shrinking
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
        self, subnets: Sequence[Subnet], base: nn.Module, selection: Any, progress: ProgressCallback | None = None
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
    topology: Topology | None = None,
    scored: int = 6,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> TeacherPool:
    """Grows a pool from a base detector and trains it by integrated progressive shrinking.

    Args:
        base: the detector that the students descend from.
        dataset: training images.
        selection: images that scores are taken on; none of them is trained on, nor was the base.
        config: phases and settings.
        folder: where the pool is kept; once finished it holds the largest network, a checkpoint as every detector's,
            and ``pool.json``.
        space: depths and widths; by default :meth:`Space.from_base`.
        topology: of the base, verified; read off it if left out.
        scored: subnets to score afterwards, the largest and the smallest among them, so that the spread is known.
        device: where to train.
        resume: carry on from what ``folder`` holds; a finished pool is only read.
        progress: called with (what, done, total, losses) after every step.

    Returns:
        The pool, in memory as on disk.

    Raises:
        InputError: the base does not carry its architecture, or ``folder`` cannot be written.
    """
    folder = Path(folder)
    architecture_of(base, "a teacher pool")
    topology = topology if topology is not None else read(base, check=True)
    if resume and (folder / POOL).exists():
        return load_pool(folder, base, dataset, topology=topology, device=device)
    space = space or Space.from_base(topology)
    supernet = Supernet(space, *grow_base(base, topology, space))
    _say_what_is_rigid(supernet)
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


def _say_what_is_rigid(supernet: Supernet) -> None:
    """Tells, once, what of a detector all teachers of its pool have in common though others need not."""
    if not any(stage.groups for stage in supernet.stages) and supernet.space.largest == supernet.space.smallest:
        say_once("the teacher pool holds one teacher: no channel group inside of this detector passes a norm or stays "
                 "in a residual block, and no list of blocks can grow")  # fmt: skip
    if supernet.left_out:
        name, reason = next(iter(supernet.left_out.items()))
        rest = f" and {len(supernet.left_out) - 1} more" * (len(supernet.left_out) > 1)
        say_once(f"all teachers of the pool have one width in {name}{rest}: {reason}")


def load_pool(
    folder: Path | str,
    base: nn.Module,
    dataset: Any,
    *,
    topology: Topology | None = None,
    device: torch.device | str = "cpu",
) -> TeacherPool:
    """Reads a finished pool.

    Args:
        folder: where :func:`train_pool` left it.
        base: the detector whose descendants are to be taught.
        dataset: training images, for recalibration.
        topology: of the base; read off it if left out.
        device: where teachers live.

    Raises:
        InputError: the folder holds none, or its teachers cannot teach descendants of ``base``.
    """
    folder = Path(folder)
    remedy = "give the pool folder of an earlier search"
    if not (folder / POOL).is_file():
        raise InputError(f"{folder} holds no finished teacher pool: it has no {POOL}; {remedy}.")
    try:
        facts = read_json(folder / POOL, remedy)
        space = Space.from_json(facts["space"])
        members = [ScoredSubnet.from_json(member) for member in facts["members"]]
        batch_size, seed, steps = facts["batch_size"], facts["seed"], facts["steps"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no finished teacher pool of this version ({error}); {remedy}.") from None
    largest = load(folder, device)
    theirs = read(largest, check=True)
    topology = topology if topology is not None else read(base)
    _require_match(folder, base, topology, largest, theirs)
    pool = TeacherPool(Supernet(space, largest, theirs), dataset, batch_size, seed, device, members, steps)
    pool.trained_on, pool.scored_on = facts.get("trained_on"), facts.get("scored_on")
    return pool


def _require_match(folder: Path, base: nn.Module, ours: Topology, largest: nn.Module, theirs: Topology) -> None:
    """Refuses teachers of other classes, or of other channels in the levels of their pyramid."""
    classes = [list(architecture_of(model, "a teacher pool").classes) for model in (largest, base)]
    channels = [list(map(len, topology.followed)) for topology in (theirs, ours)]
    for what, (pools, bases) in (("the classes", classes), ("pyramid levels of the channels", channels)):
        if pools != bases:
            raise InputError(
                f"the teacher pool in {folder} has {what} {pools} and the base {bases}; they must be equal: leave the "
                "pool out and let the search grow one from this base."
            )


def _save_pool(folder: Path, pool: TeacherPool) -> None:
    """``pool.json`` comes last: a folder that has it is whole."""
    save(folder, pool.supernet.extract(pool.space.largest))
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
