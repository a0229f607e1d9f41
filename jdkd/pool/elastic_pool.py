"""The elastic teacher pool: grown from a base detector, trained once, then sampled at no further cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.data import batches
from jdkd.detect import load, parameter_count, read, save
from jdkd.detect.architecture import architecture_of
from jdkd.detect.checkpoint import WEIGHTS
from jdkd.errors import InputError, ModelError
from jdkd.files import content_hash, read_json, write_json
from jdkd.graph import Topology
from jdkd.notices import ProgressCallback, say_once
from jdkd.pool.foreign import require_common, require_name
from jdkd.pool.members import ScoredTeacher, Teacher
from jdkd.pool.shrinking import calibrate
from jdkd.pool.space import Space, Subnet
from jdkd.pool.supernet import Supernet
from jdkd.train import evaluate

POOL = "pool.json"
FOREIGN = "foreign"  # folder of the foreign teachers, each a detector's folder


@dataclass
class TeacherPool:
    """A trained supernet, foreign teachers beside it, and what is known of some of them.

    Args:
        supernet: the shared weights.
        dataset: training images, for recalibration.
        batch_size, seed: of the recalibration.
        device: where teachers live.
        members: the teachers that were scored, best first.
        steps: forward-backward passes that its training took, as ``jdkd pool train --steps`` counts them.
        trained_on, scored_on: fingerprints of the training images and of those that the scores are of; None where they
            are not known.
        foreign: detectors of another make by name; see :meth:`add_foreign`.
    """

    supernet: Supernet
    dataset: Any
    batch_size: int
    seed: int
    device: torch.device | str
    members: list[ScoredTeacher] = field(default_factory=list)
    steps: int = 0
    trained_on: str | None = None
    scored_on: str | None = None
    foreign: dict[str, nn.Module] = field(default_factory=dict)
    _calibrated: dict[Subnet, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)  # buffers

    @property
    def space(self) -> Space:
        return self.supernet.space

    def add_foreign(self, name: str, detector: nn.Module) -> None:
        """Makes a detector of any family a teacher beside the subnets; score it, and it is a member as they are.

        Args:
            name: what refers to it from now on, in the place of a subnet.
            detector: it carries its architecture and knows the pool's classes, in their order.

        Raises:
            InputError: the name is taken, or the detector cannot teach here: other classes, no common strides.
        """
        require_name(name, self.foreign)
        images, _ = next(batches(self.dataset, batch_size=1, steps=1, seed=self.seed, device=self.device))
        require_common(name, detector.to(self.device).eval(), self.supernet.model.to(self.device), images)
        self.foreign[name] = detector

    def named(self, name: str) -> Teacher:
        """The teacher of a name: a foreign one's, ``best`` (of the scored ones), or what :meth:`Space.named` knows.

        Raises:
            InputError: there is none.
        """
        if name in self.foreign:
            return name
        if name == "best":
            if not self.members:
                raise InputError(
                    "'best' is the teacher of the highest score, and none of this pool was scored; give largest, "
                    f"smallest, or blocks x width for each stage, such as '{self.space.smallest}'."
                )
            return self.members[0].teacher
        return self.space.named(name)

    def teacher(self, teacher: Teacher) -> nn.Module:
        """A detector in evaluation mode: a subnet as one of its own, recalibrated, or a foreign one as it was given.

        A subnet is recalibrated when it is asked for first, and is the same ever after: train the supernet before.

        Raises:
            InputError: the pool does not hold it.
        """
        if not isinstance(teacher, str):
            made = self.supernet.extract(teacher).to(self.device).eval()
            if teacher in self._calibrated:
                made.load_state_dict(self._calibrated[teacher], strict=False)
            else:
                calibrate(made, self.dataset, self.batch_size, self.seed, self.device)
                self._calibrated[teacher] = {name: buffer.clone() for name, buffer in made.named_buffers()}
            return made
        if teacher not in self.foreign:
            known = ", ".join(self.foreign) or "none"
            raise InputError(f"the pool has no foreign teacher {teacher!r}, its foreign teachers are: {known}.")
        return self.foreign[teacher].to(self.device).eval()

    def score(self, teacher: Teacher, selection: Any, shared: bool = False) -> ScoredTeacher:
        """Measures one teacher; one whose detections are no numbers scores 0, which is said."""
        return self.scored(teacher, self.teacher(teacher), selection, shared)

    def scored(self, teacher: Teacher, detector: nn.Module, selection: Any, shared: bool = False) -> ScoredTeacher:
        """The same of a teacher that is at hand already, as :meth:`teacher` gave it."""
        how: dict[str, Any] = {"device": self.device, "batch_size": self.batch_size, "shared": shared}
        try:
            score = evaluate(detector, selection, **how).map
        except ModelError as error:
            say_once(f"teacher {teacher} scores 0: {error}")
            score = 0.0
        return ScoredTeacher(teacher, score, parameter_count(detector))

    def score_members(
        self, teachers: Sequence[Teacher], selection: Any, progress: ProgressCallback | None = None
    ) -> None:
        """Scores these teachers, each once, on these images; they become the members, best first.

        Inside of a process group all processes call this, and share the images.
        """
        members, distinct = [], dict.fromkeys(teachers)
        for teacher in distinct:
            members.append(self.score(teacher, selection, shared=True))
            if progress:
                progress("pool: scoring", len(members), len(distinct), {"mAP": members[-1].map})
        self.members = sorted(members, key=lambda member: -member.map)
        self.scored_on = selection.fingerprint


def load_pool(
    folder: Path | str,
    base: nn.Module | None,
    dataset: Any,
    *,
    topology: Topology | None = None,
    device: torch.device | str = "cpu",
) -> TeacherPool:
    """Reads a finished pool.

    Args:
        folder: where :func:`jdkd.pool.train_pool` left it.
        base: the detector whose descendants are to be taught; None where it only is looked at.
        dataset: training images, for recalibration.
        topology: of the base; read off it if left out.
        device: where teachers live.

    Raises:
        InputError: the folder holds none, or its teachers cannot teach descendants of ``base``.
    """
    folder = Path(folder)
    remedy = "give the folder of a finished pool, written by `jdkd pool train` or by a search"
    if not (folder / POOL).is_file():
        raise InputError(f"{folder} holds no finished teacher pool: it has no {POOL}; {remedy}.")
    try:
        facts = read_json(folder / POOL, remedy)
        space = Space.from_json(facts["space"])
        members = [ScoredTeacher.from_json(member) for member in facts["members"]]
        batch_size, seed, steps = facts["batch_size"], facts["seed"], facts["steps"]
        foreign = list(facts.get("foreign", ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds no finished teacher pool of this version ({error}); {remedy}.") from None
    largest = load(folder, device)
    theirs = read(largest, check=True)
    if base is not None:
        topology = topology if topology is not None else read(base)
        _require_match(folder, base, topology, largest, theirs)
    pool = TeacherPool(Supernet(space, largest, theirs), dataset, batch_size, seed, device, members, steps)
    pool.trained_on, pool.scored_on = facts.get("trained_on"), facts.get("scored_on")
    pool.foreign = {name: load(folder / FOREIGN / name, device) for name in foreign}
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


def save_pool(folder: Path, pool: TeacherPool) -> None:
    """Writes a pool into a folder: its largest network as a detector, its foreign teachers, what is known of them.

    The largest has norms of its own, as every teacher: in the supernet all subnets share them. ``pool.json`` comes
    last: a folder that has it is whole.
    """
    save(folder, pool.teacher(pool.space.largest))
    for name, detector in pool.foreign.items():
        save(folder / FOREIGN / name, detector)
    facts = {
        "space": pool.space.to_json(),
        "members": [member.to_json() for member in pool.members],
        "foreign": {name: content_hash(folder / FOREIGN / name / WEIGHTS) for name in pool.foreign},
        "batch_size": pool.batch_size,
        "seed": pool.seed,
        "steps": pool.steps,
        "trained_on": pool.trained_on,
        "scored_on": pool.scored_on,
    }
    write_json(folder / POOL, facts)
