"""How a search ends: the student is chosen, the controls are trained, everything is scored on the reporting images."""

import copy
import math
import os
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from jdkd.detect import load, save
from jdkd.errors import InputError, ModelError
from jdkd.files import read_json, write_json
from jdkd.latency import Latency, Ratio
from jdkd.notices import say_once
from jdkd.run_folder import versions
from jdkd.search.archive import Archive, Candidate, Cycle
from jdkd.search.choice import choose, contender
from jdkd.search.context import SearchContext
from jdkd.search.timing import LONG
from jdkd.train import fit

RESULT = "result.json"
CONTROL_SEED = 900
MEANING = (
    "median end to end over the base's, timed in turn; all measurements of one architecture pooled, each scaled to the "
    "base's median in the latest; every sample is in archive.sqlite, table timings"
)


def conclude(archive: Archive, pool_steps: int, context: SearchContext) -> dict[str, Any]:
    """Writes ``student/`` and ``result.json`` and returns what is in the latter.

    The controls are the base trained for as long as the student's lineage: ``control`` in the same stretches
    of the learning-rate cycle, each with a fresh optimizer, ``control_single`` in one uninterrupted cycle. Latency is
    that of an architecture, so theirs is the base's. One that cannot be trained has its ``failure`` in place of scores.

    Raises:
        InputError: every candidate failed.
    """
    config = context.config
    student = _chosen(archive, context)
    single = (Cycle(student.lineage_steps, 0, student.lineage_steps, config.lr),)
    made = {
        "base": lambda: context.base,
        "control": lambda: _control("control", student.cycles, context),
        "control_single": lambda: _control("control_single", single, context),
        "student": lambda: context.detector(student),
    }
    save(config.out / "student", made["student"]())
    latency, result = archive.latency(student.architecture_id), {}
    for name, make in made.items():
        own = (latency.own, latency.ratio) if name == "student" else (latency.base, Ratio(1.0, 1.0, 1.0))
        try:
            result[name] = _row(make(), *own, 0 if name == "base" else student.lineage_steps, context)
        except ModelError as error:
            if not name.startswith("control"):
                raise
            say_once(f"{name} failed: {error} The student has one control less to be compared with.")
            result[name] = {"failure": str(error)}
        context.progress("scoring", len(result), len(made), {"mAP": result[name].get("map", math.nan)})
    result |= {
        "seed": config.seed,
        "selection": context.selection.to_json(),
        "report": context.report.to_json(),
        "device": archive.timings(student.architecture_id)[-1].environment,
        "versions": versions(),
        "command": shlex.join(config.command),
        "target_latency": config.target_latency,
        "target_met": student.latency_ratio <= config.target_latency,
        "latency_ratio_is": MEANING,
        "student_id": student.id,
        "pool_steps": pool_steps,
        "seconds": sum(candidate.seconds for candidate in archive.candidates),
    }
    write_json(config.out / RESULT, result)
    return result


def _chosen(archive: Archive, context: SearchContext) -> Candidate:
    """The student; whoever may be it is timed at length first, and its samples join those that it has."""
    target = context.config.target_latency
    if len(archive.scored) == 1:
        raise InputError(
            f"all {len(archive) - 1} candidates failed, the last one as {archive.candidates[-1].failure} Search into "
            f"another folder, at a lower lr than {context.config.lr:g}."
        )
    while True:
        students = archive.scored[1:]
        ids = {student.architecture_id for student in students}
        timed = {i for i in ids for t in archive.timings(i) if (t.stage, t.machine) == (LONG, context.machine)}
        candidate = contender(students, target, timed)
        if candidate is None:
            return choose(students, target)
        own = candidate.architecture_id
        archive.add_timing(context.timed({own: context.detector(candidate)}, LONG)[own])


def _control(name: str, cycles: tuple[Cycle, ...], context: SearchContext) -> nn.Module:
    """The base after the given stretches of training, without a teacher and without a change."""
    config = context.config
    folder = config.out / "controls" / name
    model = copy.deepcopy(context.base)
    for number, cycle in enumerate(cycles):
        train = context.training(
            cycle.steps,
            seed=CONTROL_SEED + number,
            lr=cycle.lr,
            cycle_start=cycle.start,
            cycle_steps=cycle.total,
        )
        fit(
            model, context.train, train, device=config.device, folder=folder / str(number), resume=True,
            progress=lambda *state: context.progress(name.replace("_", ", "), *state),
        )  # fmt: skip
    save(folder, context.calibrated(model))
    return load(folder, config.device)


def _row(detector: nn.Module, latency: Latency, ratio: Ratio, steps: int, context: SearchContext) -> dict[str, Any]:
    scores = context.scored(detector, context.report)
    return {
        "map": scores.map,
        "map50": scores.map50,
        "latency_ms": {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99},
        "latency_ratio": ratio.value,
        "latency_ratio_interval": list(ratio.interval),
        **context.cost(detector),
        "train_steps": steps,
    }


def read_result(out: Path) -> dict[str, Any] | None:
    """The result of a finished search, or None.

    Raises:
        InputError: there is a file that is not one.
    """
    file, remedy = out / RESULT, "remove it and resume the search that wrote it"
    if not os.path.isfile(file):  # False too for a name that no file can have, which begin() refuses in words
        return None
    result = read_json(file, remedy)
    if not isinstance(result, dict) or not isinstance(result.get("base"), dict):
        raise InputError(f"{file} has no 'base', so it is not the result of a search; {remedy}.")
    return result
