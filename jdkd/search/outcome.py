"""How a search ends: the students are chosen, the control is trained, everything is scored on the reporting images."""

import copy
import os
import shlex
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

from jdkd.detect import load, save
from jdkd.detect.checkpoint import ARCHITECTURE
from jdkd.errors import InputError, ModelError
from jdkd.files import read_json, write_json
from jdkd.latency.statistics import kendall
from jdkd.notices import say_once
from jdkd.run_folder import versions
from jdkd.search.archive import Archive, Candidate
from jdkd.search.choice import annealed, choose, contender
from jdkd.search.config import SearchConfig
from jdkd.search.context import TRAINING, SearchContext
from jdkd.search.timing import FINAL, PooledLatency
from jdkd.train import fit
from jdkd.train.checkpoint import read

RESULT = "result.json"
CONTROL_SEED = 900
MEANING = (
    "median end to end over the base's, timed in turn in the runtime that `device` names; all measurements of one "
    "architecture pooled, each scaled to the base's median in the latest, and `latency_ms` to the median that stands "
    "beside the base; every sample is in archive.sqlite, table timings"
)


def conclude(archive: Archive, pool_steps: int, fixed: float, context: SearchContext) -> dict[str, Any]:
    """Writes the students and ``result.json`` and returns what is in the latter.

    There is a student for each target, in ``student/`` where there is one target, else in ``student-0.53/`` and so on.
    The control is the base trained for as long as the longest lineage of a student, in one cycle of the learning rate.
    Latency is that of an architecture, so the control's is the base's. One that cannot be trained has its ``failure``
    in place of scores.

    Args:
        archive: everything that was tried.
        pool_steps: that the teacher pool took of the budget.
        fixed: share of the base's latency that no cut saves.
        context: data, base and settings.

    Raises:
        InputError: every candidate failed.
    """
    config = context.config
    chosen = {target: _chosen(archive, target, context) for target in config.targets}
    names = {target: "student" if len(chosen) == 1 else f"student-{target:g}" for target in chosen}
    base = archive.latency(archive.candidates[0].architecture_id)
    longest = max(student.lineage_steps for student in chosen.values())
    result: dict[str, Any] = {"base": _row(context.base, base, base, 0, context)}
    if config.control:
        result["control"] = _control(longest, base, context)
    students = []
    for done, (target, student) in enumerate(chosen.items(), start=1):
        detector = context.detector(student)
        save(config.out / names[target], detector)
        row = _row(detector, archive.latency(student.architecture_id), base, student.lineage_steps, context)
        met = _met(student, target, config)
        students.append(row | {"target": target, "target_met": met, "id": student.id, "folder": names[target]})
        context.progress("scoring", done, len(chosen), {"mAP": row["map"]})
    itself = context.against_itself()
    result |= {
        "students": students,
        "target_map": config.target_map,
        "target_met": all(student["target_met"] for student in students),
        "seed": config.seed,
        "selection": context.selection.to_json(),
        "report": context.report.to_json(),
        "device": archive.timings(archive.candidates[0].architecture_id)[-1].environment,
        "versions": versions(),
        "command": shlex.join(config.command),
        "method": vars(config.method),
        "latency_ratio_is": MEANING,
        "fixed_share": fixed,
        "aa": {"ratio": itself.value, "interval": list(itself.interval)},
        "predictor": _predictor(archive),
        "cost": _cost(archive, pool_steps, result.get("control", {}).get("train_steps", 0), context),
    }
    write_json(config.out / RESULT, result)
    return result


def _met(student: Candidate, target: float, config: SearchConfig) -> bool:
    good = config.target_map is None or student.map >= config.target_map
    return good and student.latency_ratio <= target


def _chosen(archive: Archive, target: float, context: SearchContext) -> Candidate:
    """The student of a target; whoever may be it is timed at length first, and its samples join those that it has."""
    least = context.config.target_map
    if len(archive.scored) == 1:
        raise InputError(
            f"all {len(archive) - 1} candidates failed, the last one as {archive.candidates[-1].failure} Search into "
            f"another folder, at a lower lr than {context.config.lr:g}."
        )
    while True:
        students = archive.scored[1:] if least is not None else annealed(archive.scored[1:], target)
        ids = {student.architecture_id for student in students}
        timed = {i for i in ids if archive.was_timed(i, FINAL, context.machine)}
        candidate = contender(students, target, timed, least)
        if candidate is None:
            return choose(students, target, least)
        own = candidate.architecture_id
        archive.add_timing(context.timed({own: context.detector(candidate)}, FINAL)[own])


def _control(steps: int, latency: PooledLatency, context: SearchContext) -> dict[str, Any]:
    """The row of the base trained for so many more steps, without a teacher and without a change."""
    config, folder = context.config, context.config.out / "control"
    kept = read(folder / TRAINING)
    if kept is not None and kept["config"]["steps"] != steps:  # of another student, which timings on this machine undid
        shutil.rmtree(folder)
    if not (folder / ARCHITECTURE).exists():  # which is written last
        model = copy.deepcopy(context.base)
        try:
            with context.spent.on("control"):
                fit(
                    model, context.train, context.training(steps, seed=CONTROL_SEED), device=config.device,
                    folder=folder / TRAINING, resume=True, progress=lambda *state: context.progress("control", *state),
                )  # fmt: skip
        except ModelError as error:
            say_once(f"the control failed: {error} The student has nothing to be compared with but its base.")
            return {"failure": str(error)}
        save(folder, context.calibrated(model))
    return _row(load(folder, config.device), latency, latency, steps, context)


def _row(
    detector: nn.Module, latency: PooledLatency, base: PooledLatency, steps: int, context: SearchContext
) -> dict[str, Any]:
    ratio = latency.ratio
    with context.spent.on("scoring"):
        scores = context.scored(detector, context.report)
    return {
        "map": scores.map,
        "map50": scores.map50,
        "latency_ms": latency.milliseconds(base),
        "latency_ratio": ratio.value,
        "latency_ratio_interval": list(ratio.interval),
        **context.cost(detector),
        "train_steps": steps,
    }


def _predictor(archive: Archive) -> dict[str, Any]:
    """How well latencies were predicted, before each was measured, of all architectures; None of too few to tell."""
    pairs = {
        one.architecture_id: (one.predicted, one.latency_ratio) for one in archive.scored[1:] if one.kind == "morph"
    }
    errors = [abs(predicted / ratio - 1) for predicted, ratio in pairs.values()]
    return {
        "architectures": len(pairs),
        "kendall_tau": kendall(list(pairs.values())) if len(pairs) > 1 else None,
        "mean_absolute_percentage_error": 100 * sum(errors) / len(errors) if errors else None,
    }


def _cost(archive: Archive, pool_steps: int, control_steps: int, context: SearchContext) -> dict[str, Any]:
    """What the search took: steps, seconds of this process, and those of the candidates, wherever they were made."""
    seconds: dict[str, float] = defaultdict(float)
    for candidate in archive.candidates:
        for what, spent in candidate.seconds.items():
            seconds[what] += spent
    steps = {"pool_steps": pool_steps, "candidate_steps": sum(one.steps for one in archive.candidates)}
    spent = {"seconds": dict(context.spent.seconds), "candidate_seconds": dict(seconds)}
    return {**steps, "control_steps": control_steps, **spent}


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
    students = result.get("students")
    needed = {"id", "folder", "target", "target_met", "map", "latency_ratio"}
    if not isinstance(students, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in students):
        raise InputError(f"{file} does not say of its students {', '.join(sorted(needed))}; {remedy}.")
    return result
