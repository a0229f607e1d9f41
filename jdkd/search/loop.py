"""The joint search (Joint-DetNAS, Yao et al., CVPR 2021, driven by PKD, Cao et al., NeurIPS 2022).

A :class:`jdkd.search.strategy.Strategy` decides a generation, an executor trains and scores its candidates wherever
there is room, and then, with every worker idle, this process times them in turn with the base and archives them. The
learning rate stays high while students compete, and those that go on alone are annealed, each in cycles of its own.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

from jdkd.detect.architecture import architecture_of
from jdkd.detect.checkpoint import WEIGHTS
from jdkd.detect.input_size import require_resizing, require_visible
from jdkd.errors import InputError
from jdkd.execution import Journal, executor
from jdkd.files import read_as, write_json
from jdkd.latency.table import LatencyTable
from jdkd.notices import ProgressCallback, say_once
from jdkd.pool import TeacherPool
from jdkd.run_folder import RunFolder
from jdkd.search.archive import ARCHIVE, Archive, Candidate
from jdkd.search.budget import Plan, plan
from jdkd.search.config import SearchConfig
from jdkd.search.context import TRAINING, SearchContext, candidate_folder, open_context
from jdkd.search.evaluator import Evaluator, SearchTask
from jdkd.search.matching import Matching
from jdkd.search.outcome import conclude, read_result
from jdkd.search.proposal import Proposal
from jdkd.search.strategy import Strategy
from jdkd.search.teachers import given_pool, grown_pool, remember, require_teachers, require_there, write_teachers
from jdkd.search.timing import Timing
from jdkd.train.checkpoint import CHECKPOINT
from jdkd.train.record import trained_at

GENERATION, TABLE, SPENT = "generation.json", "latency_table.json", "spent.json"
UNSTEADY = 0.05  # by which the base may differ from itself; our choice: about two thirds of our searches stayed within
LITTLE = 0.2  # of what cuts can save: both searches of ours for a target that leaves less ended with a weak student


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
    run = RunFolder(config.out)
    known = run.require("search", resume=config.resume)
    require_there(config)
    if config.train_sizes is None:
        config = replace(config, train_sizes=trained_at(config.base))
    context = open_context(config, progress or (lambda *state: None))
    if known is not None:
        run.require("search", context.identity(), resume=True)
    found = read_result(config.out)
    for student in found["students"] if found else ():
        if not (config.out / student["folder"] / WEIGHTS).exists():
            raise InputError(
                f"this search is finished, but its student in {config.out / student['folder']} is gone; copy it from "
                f"{config.out / candidate_folder(int(student['id'].partition('-')[0]))}."
            )
    if found is None:
        context.require_pyramid()
        require_visible(context.base, context.image_sizes, "the base")
        require_resizing(context.base, config.train_sizes)
        require_teachers(context)
    budget = plan(config, context.steps)
    given = config.teacher_pool and given_pool(config.teacher_pool, context)
    if known is None:
        context.try_runtime()
    how: dict[str, Any] = {"resume": config.resume, "command": config.command, "where": context.where()}
    evaluator = Evaluator(context, given or None)
    with nullcontext() if found else closing(_workers(evaluator)) as workers:
        run.begin("search", context.identity(), **how)
        result = found or _searched(evaluator, budget, cast(Journal, workers))
    if not cast(dict[str, Any], run.read())["finished"]:
        run.finish()
    run.close()
    return result


def _searched(evaluator: Evaluator, budget: Plan, workers: Journal) -> dict[str, Any]:
    """The result of a search that has not come to its end yet."""
    context, config = evaluator.context, evaluator.context.config
    context.keep_budget()
    with closing(Archive(config.out / ARCHIVE)) as archive, _accounted(context):
        if not archive.candidates:
            _require_no_candidates(context)
            _add_base(archive, context)  # before the pool: a base that cannot be scored costs no training
        _time_on_this_machine(archive, context)
        table = _table(context)  # before the pool too: a base that cannot be timed
        _say_what_is_left(table, config.targets)
        if budget.pool:
            with context.spent.on("pool"):
                evaluator.pool = grown_pool(context, budget)
        pool = evaluator.pool
        if pool is not None:
            with context.spent.on("scoring"):
                remember(pool, context)
        _tell(archive, budget, pool, context)
        strategy = Strategy(context, budget, Matching(context, pool, archive.candidates[0].map), table)
        while proposals := _generation(strategy, archive, workers, context):
            _run(proposals, workers, archive, context)
            _tell(archive, budget, pool, context)
        return conclude(archive, pool.steps if pool and budget.pool else 0, table.fixed, context)


@contextmanager
def _accounted(context: SearchContext) -> Iterator[None]:
    """Keeps what the time is spent on, over the runs of a search; a run that is killed leaves no account of itself."""
    file = context.config.out / SPENT
    if file.exists():
        kept = read_as(lambda seconds: {str(k): float(v) for k, v in seconds.items()}, file, "remove it and resume")
        context.spent.seconds |= kept
    try:
        with context.spent.on("everything else"):
            yield
    finally:
        write_json(file, context.spent.seconds)


def _tell(archive: Archive, budget: Plan, pool: TeacherPool | None, context: SearchContext) -> None:
    """Reports how far the budget is spent."""
    taken = pool.steps if pool and budget.pool else 0  # a pool that was given cost nothing of it
    taken += sum(candidate.steps for candidate in archive.candidates)
    context.progress("budget", taken, budget.total, {"generations": len(budget.rungs)})


def _workers(evaluator: Evaluator) -> Journal:
    """Who trains and scores the candidates."""
    config = evaluator.context.config
    how: dict[str, Any] = {"workers": config.workers, "ray": config.ray, "progress": evaluator.context.progress}
    made = executor(SearchTask(config), config.device, **how, evaluate=evaluator)
    return Journal(made, config.out / "outcomes")


def _generation(strategy: Strategy, archive: Archive, workers: Journal, context: SearchContext) -> list[Proposal]:
    """The candidates to make next: those on disk that a kill has left, or new ones."""
    file = context.config.out / GENERATION
    if file.exists():
        remedy = "remove it and resume: the generation is decided anew"
        kept = read_as(lambda proposals: [*map(Proposal.from_json, proposals)], file, remedy)
        unfinished = [proposal for proposal in kept if proposal.number >= len(archive)]
        known = {candidate.id for candidate in archive.candidates}
        whole = [*range(len(archive), len(archive) + len(unfinished))] == [each.number for each in unfinished]
        if unfinished and whole and all(each.parent in known for each in unfinished):  # else the archive was lost
            return unfinished
    _clear(archive, strategy.plan, context)
    workers.clear()
    with context.spent.on("proposing"):
        proposals = strategy.ask(archive)
    if strategy.matching.pool is not None:
        write_teachers(strategy.matching.pool, context)
    for proposal in proposals:  # what another of that number has left is no training of this one to carry on
        shutil.rmtree(context.folder(proposal.number) / TRAINING, ignore_errors=True)
    write_json(file, [proposal.to_json() for proposal in proposals])
    return proposals


def _run(proposals: list[Proposal], workers: Journal, archive: Archive, context: SearchContext) -> None:
    """Makes a generation: all are trained and scored, then timed, then archived in order."""
    by_id = {candidate.id: candidate for candidate in archive.candidates}
    jobs = [proposal.to_json() | {"from": _whence(by_id[proposal.parent])} for proposal in proposals]
    outcomes = {}
    with context.spent.on("candidates"):
        for job, outcome in workers.run(jobs):
            outcomes[job["number"]] = outcome
            context.progress("candidates", len(outcomes), len(jobs), {"mAP": outcome.get("map", math.nan)})
    for proposal in proposals:
        _archive(proposal, by_id[proposal.parent], outcomes[proposal.number], archive, context)


def _whence(parent: Candidate) -> str | None:
    return None if parent.kind == "base" else candidate_folder(parent.number)


def _archive(
    proposal: Proposal, parent: Candidate, outcome: dict[str, Any], archive: Archive, context: SearchContext
) -> None:
    """Times a candidate and adds it to the archive; one that failed, or that its runtime cannot run, as such."""
    failure, cycle, begun = outcome.get("failure"), proposal.cycle, time.perf_counter()
    spent = outcome.get("seconds", {})
    timing: Timing | None = None
    known: dict[str, Any] = {"architecture": parent.architecture, "params": parent.params, "gmacs": parent.gmacs}
    if failure is None:
        student = context.made(proposal.number)
        own = architecture_of(student, "search")
        try:
            timing = context.timed({own.id: student})[own.id]
            known = {"architecture": own, **context.cost(student)}
        except InputError as error:  # of the runtime, which has run the base
            failure, outcome = str(error), {}
    if failure is not None:
        say_once(
            f"candidate {proposal.number} ({proposal.action}) failed, and the search goes on without it: {failure}"
        )
    seconds = spent | {"timing": time.perf_counter() - begun}
    archive.add(
        timing,
        number=proposal.number,
        id=f"{proposal.number:03d}-{known['architecture'].id[:8]}",
        parent=parent.id,
        generation=proposal.generation,
        kind=proposal.kind,
        action=proposal.action,
        teacher=proposal.teacher,
        target=proposal.target,
        predicted=proposal.predicted,
        architecture_id=known["architecture"].id,
        **known,
        map=outcome.get("map", math.nan),
        map50=outcome.get("map50", math.nan),
        steps=cycle.steps,
        lineage_steps=parent.lineage_steps + cycle.steps,
        cycles=(*parent.cycles, cycle),
        seconds=seconds,
        failure=failure,
    )


def _require_no_candidates(context: SearchContext) -> None:
    """Refuses to begin anew over the candidates of an archive that is gone, or that a disk has left empty."""
    folder = context.folder(1).parent
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{context.config.out / ARCHIVE} is gone or empty, and {folder} holds candidates of it; put the archive "
            f"back, or remove {folder} to begin the search again."
        )


def _add_base(archive: Archive, context: SearchContext) -> None:
    """The base as the first entry of the archive, timed against itself."""
    begun = time.perf_counter()
    with context.spent.on("scoring"):
        scores = context.scored(context.base, context.selection)
    scored = time.perf_counter()
    known = architecture_of(context.base, "search")
    timing = context.timed({known.id: context.base})[known.id]
    archive.add(
        timing,
        number=0,
        id=f"000-{known.id[:8]}",
        parent=None,
        generation=0,
        kind="base",
        action="base",
        teacher=None,
        target=None,
        architecture=known,
        architecture_id=known.id,
        **context.cost(context.base),
        map=scores.map,
        map50=scores.map50,
        steps=0,
        lineage_steps=0,
        cycles=(),
        seconds={"scoring": scored - begun, "timing": time.perf_counter() - scored},
        failure=None,
    )


def _table(context: SearchContext) -> LatencyTable:
    """What the parts of the base cost here; measured once a machine."""
    file = context.config.out / TABLE
    if file.exists():
        remedy = "remove it and resume: the parts are timed again"
        machine, table = read_as(lambda kept: (kept["machine"], LatencyTable.from_json(kept["table"])), file, remedy)
        if machine == context.machine:
            return table
    _say_if_unsteady(context)
    table = context.latency_table()
    write_json(file, {"machine": context.machine, "table": table.to_json()})
    return table


def _say_if_unsteady(context: SearchContext) -> None:
    """Says before anything is chosen by latency that the clock cannot tell a detector from itself."""
    ratio = context.against_itself()
    if max(abs(end - 1) for end in ratio.interval) > UNSTEADY:
        say_once(
            f"the base timed against itself takes {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) of its own "
            "time: other work on this machine disturbs the clock, and students are cut by such timings; let it end, "
            "or give the search cores of its own."
        )


def _say_what_is_left(table: LatencyTable, targets: Sequence[float]) -> None:
    """Says before anything is trained which targets leave next to nothing of what can be cut."""
    for target in targets:
        if (left := table.left(target)) < LITTLE:
            beyond = f"; the fastest version that was timed, hardly a detector, takes {table.least:.2f}"
            beyond = beyond if target < table.least else ""
            say_once(
                f"about {table.fixed:.2f} of the base's latency is none that a cut saves, so a student at {target:g} "
                f"has {left:.0%} of the rest and will hardly be as good{beyond}; take a "
                "larger target, or a base whose convolutions take the time: of larger images, or wider."
            )


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


def _clear(archive: Archive, budget: Plan, context: SearchContext) -> None:
    """Removes the checkpoints of candidates that no longer can be trained on; their logs stay."""
    last = max(candidate.generation for candidate in archive.candidates)
    trainable = range(last, len(budget.rungs))  # generations with children to come
    for candidate in archive.candidates:
        if last > budget.exploring and candidate.generation not in trainable:
            (context.folder(candidate.number) / TRAINING / CHECKPOINT).unlink(missing_ok=True)
