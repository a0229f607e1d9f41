"""The joint search (Joint-DetNAS, Yao et al., CVPR 2021, driven by PKD, Cao et al., NeurIPS 2022).

Two processes alternate: student morphism keeps the teacher and changes the student, dynamic distillation
keeps the student and changes the teacher. A child inherits its parent's weights and is trained for a short
while with the detection loss and the Pearson loss to its teacher. All candidates share one learning-rate
cosine that spans the search, so whichever lineage survives has been annealed, and its controls can follow
the same pattern.
"""

import math
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
from jdkd.detect.contract import architecture_of
from jdkd.distill import Distiller
from jdkd.errors import InputError, ModelError
from jdkd.files import read_json, write_json
from jdkd.notices import say_once
from jdkd.pool import PoolTrainConfig, ScoredTeacher, Subnet, TeacherPool, load_pool, train_pool
from jdkd.pool.shrinking import ProgressCallback
from jdkd.run_folder import RunFolder
from jdkd.search.archive import ARCHIVE, Archive, Cycle
from jdkd.search.choice import fitness, pareto_front
from jdkd.search.config import Plan, SearchConfig, plan
from jdkd.search.context import SearchContext, open_context, say_if_trained_elsewhere
from jdkd.search.matching import match
from jdkd.search.outcome import conclude, read_result
from jdkd.search.screening import screen
from jdkd.search.timing import Timing
from jdkd.train import DivergenceError, fit

DISTILL_DELAY = 0.1  # share of a candidate's steps that a new teacher keeps silent
TOURNAMENT = 3  # members of the front that are drawn, of whom the fittest becomes the parent
TEACHERS = "teachers.json"


@dataclass(frozen=True)
class Decision:
    """What the next candidate is to be; kept on disk until it is in the archive, so that a kill repeats nothing."""

    parent: str
    kind: str
    action: str
    teacher: Subnet
    feature_channels: tuple[tuple[int, ...], ...]
    new_teacher: bool


def search(config: SearchConfig, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Runs the joint search and writes everything it finds into ``config.out``.

    Args:
        config: what to search for.
        progress: called with (what, done, total, values) as the work goes on.

    Returns:
        The result, as written to ``result.json``.

    Raises:
        InputError: the base, the data, the pool or the budget cannot be used, or ``out`` holds another search;
            nothing has been written then.
    """
    context = open_context(config, progress or (lambda *state: None))
    if read_result(config.out) is None:
        context.require_pyramid()
    budget = plan(config, len(context.train))
    given = config.teacher_pool and _given_pool(config.teacher_pool, context)
    run = RunFolder(config.out)
    how = {"resume": config.resume, "command": config.command, "where": context.where()}
    run.begin("search", context.identity(), **how)
    result = read_result(config.out) or _searched(context, budget, given)
    if not run.read()["finished"]:
        run.finish()
    return result


def _searched(context: SearchContext, budget: Plan, given: TeacherPool | None) -> dict[str, Any]:
    """The result of a search that has not come to its end yet."""
    config = context.config
    archive = Archive(config.out / ARCHIVE)
    try:
        if not archive.candidates:
            _add_base(archive, context)  # before the pool: a base that cannot be scored costs no training
        pool = given or _grown_pool(context, budget)
        _remember(pool, context)
        _time_on_this_machine(archive, context)
        _clear(len(archive) - 1, context)  # where a kill came between
        for number in range(len(archive), budget.candidates + 1):
            _run_candidate(number, archive, pool, context, budget)
            _clear(number, context)
            context.progress("candidates", number, budget.candidates, {"mAP": archive.candidates[-1].map})
        return conclude(archive, pool.steps, context)
    finally:
        archive.close()


def _given_pool(folder: Path, context: SearchContext) -> TeacherPool:
    """The pool of an earlier search."""
    pool = load_pool(folder, context.base, context.train, topology=context.topology, device=context.config.device)
    say_if_trained_elsewhere(f"the teacher pool in {folder}", pool.trained_on, context.train)
    return pool


def _grown_pool(context: SearchContext, budget: Plan) -> TeacherPool:
    """The pool that this search grows from its base."""
    config = context.config
    try:
        return train_pool(
            context.base,
            context.train,
            context.selection.dataset,
            PoolTrainConfig(context.training(budget.pool, seed=100, lr=2 * config.lr), head_weight=1.0),
            config.out / "pool",
            topology=context.topology,
            device=config.device,
            resume=config.resume,
            progress=context.progress,
        )
    except DivergenceError as error:
        raise InputError(
            f"no teacher pool can be grown at twice the lr of {config.lr:g}: at step {error.step} {error.what} is not "
            "finite; search into another folder at a lower lr, or give a teacher_pool."
        ) from error


def _remember(pool: TeacherPool, context: SearchContext) -> None:
    """Gives the pool the members that this search has scored; a pool that was scored on other images is scored anew."""
    file, selection = context.config.out / TEACHERS, context.selection.dataset
    if file.exists():
        members = read_json(file, "remove it and resume: teachers are scored again")
        pool.members = [ScoredTeacher.from_json(member) for member in members]
    elif pool.scored_on != selection.fingerprint:
        pool.score_members([member.teacher for member in pool.members], selection, context.progress)
        _write_teachers(pool, context)


def _write_teachers(pool: TeacherPool, context: SearchContext) -> None:
    write_json(context.config.out / TEACHERS, [member.to_json() for member in pool.members])


def _time_on_this_machine(archive: Archive, context: SearchContext) -> None:
    """Times again what was only timed on another machine, where a search goes on elsewhere: ratios do not mix."""
    known = {candidate.architecture_id: candidate for candidate in archive.scored}
    away = {name: one for name, one in known.items() if archive.timings(name)[-1].machine != context.machine}
    if away:
        elsewhere = archive.timings(next(iter(away)))[-1].machine
        say_once(
            f"this search was timed on {elsewhere} and goes on on {context.machine}: the {len(away)} architectures "
            "that it has are timed again."
        )
    for name, candidate in away.items():
        archive.add_timing(context.timed({name: context.detector(candidate)})[name])


def _add_base(archive: Archive, context: SearchContext) -> None:
    """The base as the first entry of the archive."""
    begun = time.perf_counter()
    timing, scores = _measured(context.base, context)
    archive.add(
        timing,
        number=0,
        id=f"000-{context.base_id[:8]}",
        parent=None,
        kind="base",
        action="base",
        teacher=None,
        **_architecture(context.base, context),
        feature_channels=tuple(tuple(range(len(level))) for level in context.topology.followed),
        steps=0,
        lineage_steps=0,
        cycles=(),
        **scores,
        seconds=time.perf_counter() - begun,
    )


def _run_candidate(number: int, archive: Archive, pool: TeacherPool, context: SearchContext, budget: Plan) -> None:
    """Decides, inherits, trains, scores, times and archives one candidate; one that fails is archived as such."""
    begun = time.perf_counter()
    config = context.config
    folder = context.folder(number)
    decision = _decided(folder, number, archive, pool, context)
    parent = next(candidate for candidate in archive.candidates if candidate.id == decision.parent)
    student = load(folder / "init", config.device)
    steps = budget.per_candidate
    cycle = Cycle(steps, (number - 1) * steps, budget.lineage, config.lr)
    train = context.training(steps, seed=number, cycle_start=cycle.start, cycle_steps=cycle.total)
    silent = round(DISTILL_DELAY * steps) if decision.new_teacher else 0
    failure = None
    try:
        with _taught(student, pool.teacher(decision.teacher), decision.feature_channels, silent, config) as losses:
            fit(
                student,
                context.train,
                train,
                device=config.device,
                losses=losses,
                folder=folder / "training",
                resume=True,
                progress=lambda *state: context.progress(f"candidate {number}: {decision.action}", *state),
            )
        save(folder, context.calibrated(student))
        timing, scores = _measured(student, context)
    except ModelError as error:
        failure, timing, scores = str(error), None, {"map": math.nan, "map50": math.nan}
        say_once(f"candidate {number} ({decision.action}) failed, and the search goes on without it: {failure}")
    archive.add(
        timing,
        number=number,
        id=f"{number:03d}-{architecture_of(student, 'search').id[:8]}",
        parent=parent.id,
        kind=decision.kind,
        action=decision.action,
        teacher=decision.teacher,
        **_architecture(student, context),
        feature_channels=decision.feature_channels,
        steps=steps,
        lineage_steps=parent.lineage_steps + steps,
        cycles=(*parent.cycles, cycle),
        **scores,
        seconds=time.perf_counter() - begun,
        failure=failure,
    )


def _decided(folder: Path, number: int, archive: Archive, pool: TeacherPool, context: SearchContext) -> Decision:
    """The decision for this candidate: the one on disk if there is one, or a new one."""
    file = folder / "decision.json"
    if file.exists() and (folder / "init").exists():
        fields = read_json(file, f"remove {folder} and resume")
        lists = {
            "teacher": Subnet.from_json(fields["teacher"]),
            "feature_channels": tuple(map(tuple, fields["feature_channels"])),
        }
        return Decision(**fields | lists)
    decision, student = _decide(number, archive, pool, context)
    save(folder / "init", student)
    _write_teachers(pool, context)
    write_json(file, {**vars(decision), "teacher": decision.teacher.to_json()})
    return decision


def _decide(number: int, archive: Archive, pool: TeacherPool, context: SearchContext) -> tuple[Decision, nn.Module]:
    """Odd candidates change the student, even ones the teacher."""
    config = context.config
    rng = random.Random(f"{config.seed}/{number}")
    torch.manual_seed(rng.getrandbits(63))  # fresh weights of what is added
    front = pareto_front(archive.scored)
    drawn = rng.sample(front, min(TOURNAMENT, len(front)))
    parent = max(drawn, key=lambda candidate: fitness(candidate, config.target_latency))
    student = context.detector(parent)
    present = parent.teacher or pool.members[0].teacher
    if number % 2:
        known = {candidate.architecture_id: candidate.latency_ratio for candidate in archive.scored}
        chosen = screen(student, known, context, rng)
        channels = tuple(
            tuple(level[channel] for channel in kept)
            for level, kept in zip(parent.feature_channels, chosen.kept, strict=True)
        )
        new = parent.teacher is None
        return Decision(parent.id, "morph", chosen.action, present, channels, new), chosen.student
    teacher, action = match(student, parent.map, parent.feature_channels, present, pool, context, rng)
    new = teacher != parent.teacher
    return Decision(parent.id, "teacher", action, teacher, parent.feature_channels, new), student


@contextmanager
def _taught(
    student: nn.Module, teacher: nn.Module, channels: tuple[tuple[int, ...], ...], silent: int, config: SearchConfig
) -> Iterator[Any]:
    """The losses of a student under a teacher that keeps silent for the first steps."""
    weights = {"feature_weight": config.feature_weight, "head_weight": config.head_weight}
    with Distiller(student, teacher, channels=channels, **weights) as distiller:

        def losses(images: list[Tensor], targets: list[dict[str, Tensor]], step: int) -> Iterator[dict[str, Tensor]]:
            distiller.runner.enabled = step >= silent
            own = student(images, targets)
            yield own if step < silent else own | distiller.losses()

        yield losses


def _clear(number: int, context: SearchContext) -> None:
    """Removes what only the resume of a candidate needs, once it is in the archive."""
    for leftover in ("training", "init"):
        shutil.rmtree(context.folder(number) / leftover, ignore_errors=True)


def _measured(detector: nn.Module, context: SearchContext) -> tuple[Timing, dict[str, float]]:
    """Times a detector and scores it on the images that select, as it would be deployed."""
    own, scores = architecture_of(detector, "search").id, context.scored(detector, context.selection)
    return context.timed({own: detector})[own], {"map": scores.map, "map50": scores.map50}


def _architecture(detector: nn.Module, context: SearchContext) -> dict[str, Any]:
    """What an archive says of an architecture, besides its latency."""
    known = architecture_of(detector, "search")
    return {"architecture": known, "architecture_id": known.id, **context.cost(detector)}
