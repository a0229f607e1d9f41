"""How a search ends: the student is chosen, the controls are trained, everything is scored and timed once more."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from jdkd.detect import load, save
from jdkd.files import write_json
from jdkd.latency import REPORTED, LatencyReport, count, deployable, measure
from jdkd.run_folder import versions
from jdkd.search.archive import Archive, Candidate, Cycle
from jdkd.search.setting import Setting
from jdkd.train import Scores, evaluate, fit

RESULT = "result.json"
CONTROL_SEED = 900


def choose(candidates: list[Candidate], target: float) -> Candidate:
    """The best of those that meet the target latency, or the fastest where none does."""
    fast = [candidate for candidate in candidates if candidate.latency_ratio <= target]
    return max(fast, key=lambda c: c.map) if fast else min(candidates, key=lambda c: c.latency_ratio)


def conclude(archive: Archive, pool_steps: int, setting: Setting) -> dict[str, Any]:
    """Writes ``student/`` and ``result.json`` and returns what is in the latter.

    The controls are the base trained for as long as the student's lineage: ``control`` in the same stretches
    of the learning-rate cycle, each with a fresh optimizer, ``control_single`` in one uninterrupted cycle.
    """
    config = setting.config
    student = choose(archive.candidates[1:], config.target_latency)
    single = (Cycle(student.lineage_steps, 0, student.lineage_steps, config.lr),)
    detectors = {
        "base": setting.base,
        "control": _control("control", student.cycles, setting),
        "control_single": _control("control_single", single, setting),
        "student": load(config.out / "candidates" / f"{student.number:03d}", config.device),
    }
    save(config.out / "student", detectors["student"])
    deployed = {name: deployable(detector) for name, detector in detectors.items()}
    scores = {}
    for name, model in deployed.items():
        scores[name] = evaluate(model, setting.val, device=config.device, batch_size=config.batch_size)
        setting.progress("scoring", len(scores), len(deployed), {"mAP": scores[name].map})
    report = measure(
        deployed,
        setting.timing_images,
        device=config.device,
        rounds=5 * config.latency_rounds,
        min_seconds=config.latency_seconds,
        warmup_seconds=min(REPORTED.warmup_seconds, config.latency_seconds),
        progress=lambda *state: setting.progress("timing", *state),
    )
    steps = {name: 0 if name == "base" else student.lineage_steps for name in detectors}
    result = {name: _row(name, detectors[name], scores[name], report, steps[name], setting) for name in detectors}
    result |= {
        "seed": config.seed,
        "device": report.environment,
        "versions": versions(),
        "command": " ".join(["jdkd", *sys.argv[1:]]),
        "target_latency": config.target_latency,
        "target_met": result["student"]["latency_ratio"] <= config.target_latency,
        "student_id": student.id,
        "pool_steps": pool_steps,
        "seconds": sum(candidate.seconds for candidate in archive.candidates),
    }
    write_json(config.out / RESULT, result)
    return result


def _control(name: str, cycles: tuple[Cycle, ...], setting: Setting) -> nn.Module:
    """The base after the given stretches of training, without a teacher and without a change."""
    config = setting.config
    folder = config.out / "controls" / name
    model = copy.deepcopy(setting.base)
    for number, cycle in enumerate(cycles):
        train = setting.training(
            cycle.steps,
            seed=CONTROL_SEED + number,
            lr=cycle.lr,
            cycle_start=cycle.start,
            cycle_steps=cycle.total,
        )
        fit(
            model, setting.train, train, device=config.device, folder=folder / str(number), resume=True,
            progress=lambda *state: setting.progress(name.replace("_", ", "), *state),
        )  # fmt: skip
    save(folder, setting.calibrated(model))
    return load(folder, config.device)


def _row(
    name: str, detector: nn.Module, scores: Scores, report: LatencyReport, steps: int, setting: Setting
) -> dict[str, Any]:
    latency, ratio = report.models[name].end_to_end, report.ratio(name)
    cost = count(detector, tuple(setting.timing_images[0].shape[1:]))
    return {
        "map": scores.map,
        "map50": scores.map50,
        "latency_ms": {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99},
        "latency_ratio": ratio.value,
        "latency_ratio_interval": list(ratio.interval),
        "params": cost.params,
        "gmacs": cost.gmacs,
        "train_steps": steps,
    }


def read_result(out: Path) -> dict[str, Any] | None:
    """The result of a finished search, or None."""
    file = out / RESULT
    return json.loads(file.read_text()) if file.is_file() else None
