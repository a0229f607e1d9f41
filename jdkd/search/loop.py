"""The joint search (Joint-DetNAS, Yao et al., CVPR 2021, driven by PKD, Cao et al., NeurIPS 2022).

Two processes alternate: student morphism keeps the teacher and changes the student, dynamic distillation
keeps the student and changes the teacher. A child inherits its parent's weights and is trained for a short
while with the detection loss and the Pearson loss to its teacher. All candidates share one learning-rate
cosine that spans the search, so whichever lineage survives has been annealed, and its controls can follow
the same pattern.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.detect import load, save
from jdkd.distill import Distiller
from jdkd.errors import InputError
from jdkd.files import write_json
from jdkd.latency import Cost, count, deployable
from jdkd.pool import Member, Recipe, Subnet, TeacherPool, load_pool, train_pool
from jdkd.search.archive import ARCHIVE, Archive, Candidate, Cycle, pareto_front
from jdkd.search.config import Plan, SearchConfig, plan
from jdkd.search.matching import match
from jdkd.search.outcome import conclude, read_result
from jdkd.search.screening import screen
from jdkd.search.setting import Progress, Setting, open_setting
from jdkd.train import evaluate, fit

WITHOUT_IMITATION = 0.1  # share of a candidate's steps that a new teacher keeps silent
PRESSURE = 2.0  # exponent of the latency in a parent's fitness (the form is MnasNet's, Tan et al., CVPR 2019)
TOURNAMENT = 3  # members of the front that are drawn, of whom the fittest becomes the parent
TEACHERS = "teachers.json"


@dataclass(frozen=True)
class Decision:
    """What the next candidate is to be; kept on disk until it is in the archive, so that a kill repeats nothing."""

    parent: str
    kind: str
    action: str
    teacher: Subnet
    feature_channels: tuple[int, ...]
    new_teacher: bool


def search(config: SearchConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the joint search and writes everything it finds into ``config.out``.

    Args:
        config: what to search for.
        progress: told (what, done, total, values) as the work goes on.

    Returns:
        The result, as written to ``result.json``.

    Raises:
        InputError: the base, the data, the pool or the budget cannot be used, or ``out`` holds another search.
    """
    if config.resume and (finished := read_result(config.out)):
        return finished
    if not config.resume and (config.out / ARCHIVE).exists():
        raise InputError(f"{config.out} holds another search ({ARCHIVE}); resume it or give another folder.")
    setting = open_setting(config, progress or (lambda *state: None))
    budget = plan(config, len(setting.train))
    config.out.mkdir(parents=True, exist_ok=True)
    pool = _pool(setting, budget)
    archive = Archive(config.out / ARCHIVE)
    try:
        if not archive.candidates:
            archive.add(_base(setting))
        for number in range(len(archive), budget.candidates + 1):
            _raise_candidate(number, archive, pool, setting, budget)
            setting.progress("candidates", number, budget.candidates, {"mAP": archive.candidates[-1].map})
        return conclude(archive, pool.steps, setting)
    finally:
        archive.close()


def fitness(candidate: Candidate, target: float) -> float:
    """mAP, reduced where the latency misses the target: what is too slow yet is worth little as a parent."""
    return candidate.map * min(1.0, target / candidate.latency_ratio) ** PRESSURE


def _pool(setting: Setting, budget: Plan) -> TeacherPool:
    config = setting.config
    if config.teacher_pool:
        pool = load_pool(config.teacher_pool, setting.base, setting.train, device=config.device)
    else:
        recipe = Recipe(setting.training(budget.pool, seed=100, lr=2 * config.lr), head_weight=1.0)
        pool = train_pool(
            setting.base,
            setting.train,
            setting.selection,
            recipe,
            config.out / "pool",
            device=config.device,
            resume=config.resume,
            progress=setting.progress,
        )
    remembered = config.out / TEACHERS
    if remembered.exists():
        pool.members = [Member.from_json(member) for member in json.loads(remembered.read_text())]
    return pool


def _base(setting: Setting) -> Candidate:
    """The base as the first entry of the archive."""
    spec = setting.base.spec
    return _measured(
        setting.base,
        setting,
        number=0,
        id=f"000-{spec.id[:8]}",
        parent=None,
        kind="base",
        action="base",
        teacher=None,
        feature_channels=tuple(range(spec.fpn)),
        steps=0,
        lineage_steps=0,
        cycles=(),
        begun=time.perf_counter(),
    )


def _raise_candidate(number: int, archive: Archive, pool: TeacherPool, setting: Setting, budget: Plan) -> None:
    """Decides, inherits, trains, scores, times and archives one candidate."""
    begun = time.perf_counter()
    config = setting.config
    folder = config.out / "candidates" / f"{number:03d}"
    decision = _decided(folder, number, archive, pool, setting)
    parent = next(candidate for candidate in archive.candidates if candidate.id == decision.parent)
    student = load(folder / "born", config.device)
    steps = budget.per_candidate
    cycle = Cycle(steps, (number - 1) * steps, budget.lineage, config.lr)
    train = setting.training(steps, seed=number, cycle_start=cycle.start, cycle_steps=cycle.total)
    silent = round(WITHOUT_IMITATION * steps) if decision.new_teacher else 0
    with _taught(student, pool.teacher(decision.teacher), decision.feature_channels, silent, config) as losses:
        fit(
            student,
            setting.train,
            train,
            device=config.device,
            losses=losses,
            folder=folder / "training",
            resume=True,
            progress=lambda *state: setting.progress(f"candidate {number}: {decision.action}", *state),
        )
    save(folder, setting.calibrated(student))
    candidate = _measured(
        student,
        setting,
        number=number,
        id=f"{number:03d}-{student.spec.id[:8]}",
        parent=parent.id,
        kind=decision.kind,
        action=decision.action,
        teacher=decision.teacher,
        feature_channels=decision.feature_channels,
        steps=steps,
        lineage_steps=parent.lineage_steps + steps,
        cycles=(*parent.cycles, cycle),
        begun=begun,
    )
    archive.add(candidate)
    for leftover in ("training", "born"):
        shutil.rmtree(folder / leftover)


def _decided(folder: Path, number: int, archive: Archive, pool: TeacherPool, setting: Setting) -> Decision:
    """The decision for this candidate: the one on disk if there is one, or a new one."""
    file = folder / "decision.json"
    if file.exists():
        fields = json.loads(file.read_text())
        lists = {
            "teacher": Subnet.from_json(fields["teacher"]),
            "feature_channels": tuple(fields["feature_channels"]),
        }
        return Decision(**fields | lists)
    decision, student = _decide(number, archive, pool, setting)
    save(folder / "born", student)
    write_json(setting.config.out / TEACHERS, [member.to_json() for member in pool.members])
    write_json(file, {**vars(decision), "teacher": decision.teacher.to_json()})
    return decision


def _decide(number: int, archive: Archive, pool: TeacherPool, setting: Setting) -> tuple[Decision, nn.Module]:
    """Odd candidates change the student, even ones the teacher."""
    config = setting.config
    rng = random.Random(f"{config.seed}/{number}")
    torch.manual_seed(rng.getrandbits(63))  # fresh weights of what is added
    front = pareto_front(archive.candidates)
    drawn = rng.sample(front, min(TOURNAMENT, len(front)))
    parent = max(drawn, key=lambda candidate: fitness(candidate, config.target_latency))
    student = setting.base if parent.kind == "base" else load(_folder(config.out, parent), config.device)
    present = parent.teacher or pool.members[0].subnet
    if number % 2:
        chosen = screen(student, setting, rng)
        channels = tuple(parent.feature_channels[channel] for channel in chosen.kept)
        new = parent.teacher is None
        return Decision(parent.id, "morph", chosen.action, present, channels, new), chosen.student
    teacher = match(student, parent.map, parent.feature_channels, present, pool, setting, rng)
    action = f"learn from {teacher}" if teacher != present else f"stay with {teacher}"
    new = teacher != parent.teacher
    return Decision(parent.id, "teacher", action, teacher, parent.feature_channels, new), student


@contextmanager
def _taught(
    student: nn.Module, teacher: nn.Module, channels: tuple[int, ...], silent: int, config: SearchConfig
) -> Iterator[Any]:
    """The losses of a student under a teacher that keeps silent for the first steps."""
    weights = {"feature_weight": config.feature_weight, "head_weight": config.head_weight}
    with Distiller(student, teacher, channels=channels, **weights) as distiller:

        def losses(images: list[Tensor], targets: list[dict[str, Tensor]], step: int) -> Iterator[dict[str, Tensor]]:
            distiller.runner.enabled = step >= silent
            own = student(images, targets)
            yield own if step < silent else own | distiller.losses()

        yield losses


def _measured(student: nn.Module, setting: Setting, *, begun: float, **known: Any) -> Candidate:
    """Scores and times a detector as it would be deployed."""
    config, deployed = setting.config, deployable(student)
    scores = evaluate(deployed, setting.selection, device=config.device, batch_size=config.batch_size)
    report = setting.timed({"student": deployed})
    latency = report.models["student"].end_to_end
    cost: Cost = count(student, tuple(setting.timing_images[0].shape[1:]))
    return Candidate(
        **known,
        spec=student.spec,
        map=scores.map,
        map50=scores.map50,
        latency_p50=latency.p50,
        latency_ratio=setting.quiet_ratio(report, "student"),
        latency_samples=tuple(latency.samples),
        params=cost.params,
        gmacs=cost.gmacs,
        seconds=time.perf_counter() - begun,
    )


def _folder(out: Path, candidate: Candidate) -> Path:
    return out / "candidates" / f"{candidate.number:03d}"
