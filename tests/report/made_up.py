"""A search that never ran: its folder, filled with what a search of several generations and targets writes."""

import json
import math
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from jdkd.distill.responses import LevelResponses
from jdkd.pool.members import ScoredTeacher, Subnet
from jdkd.rewrite import Architecture
from jdkd.run_folder import RunFolder
from jdkd.search.archive import Archive, Candidate
from jdkd.search.proposal import Cycle
from jdkd.search.timing import Timing

ARCHITECTURE = Architecture("tests.report.made_up:stack", {"width": 32}, classes=("a", "b"))
CUT = ARCHITECTURE.replace(
    blocks={"stages.0": (0, 1), "stages.1": (0, 0, 1)},
    shapes={"stages.0.0.0.weight": (24, 32, 3, 3), "stages.0.0.0.bias": (24,), "stages.0.0.1.weight": (32, 24, 3, 3)},
)
TARGETS = (0.75, 0.53)
MEMBERS = [Subnet((3, 4, 3), (1.0, 1.0, width)) for width in (1.0, 0.8, 0.6)]


def stack(width: int = 32):
    """Two stages of blocks of two convolutions each, and a head."""
    from torch import nn

    def block(inner: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, inner, 3), nn.Conv2d(inner, width, 3), nn.ReLU())

    model = nn.Module()
    model.stem = nn.Conv2d(3, width, 3)
    model.stages = nn.ModuleList(nn.Sequential(*(block(width) for _ in range(count))) for count in (3, 2))
    model.head = nn.ModuleDict({"scores": nn.Linear(width, 3), "boxes": nn.Linear(width, 4)})
    return model


def known(number: int, score: float, ratio: float, parent: int | None = None, **changes: Any) -> dict[str, Any]:
    """Everything about a candidate but its latency."""
    size = 1.0 if math.isnan(ratio) else ratio
    first = {"kind": "base", "action": "base", "parent": None, "teacher": None, "steps": 0, "cycles": ()}
    later = {
        "kind": "morph", "action": "prune 20 % of <inner>", "parent": f"{parent or 0:03d}", "steps": 100,
        "teacher": [*MEMBERS, "a foreign one"][number % 4], "cycles": (Cycle(100, 0, 300, 2e-3),),
    }  # fmt: skip
    return {
        "number": number, "id": f"{number:03d}", "generation": -(-number // 4), "architecture": ARCHITECTURE,
        "target": 0.53 if number > 12 else None, "predicted": size * (1 + number % 5 / 50), "map": score,
        "map50": 1.5 * score, "architecture_id": f"spec {number}", "lineage_steps": 100 * number, "gmacs": 0.4 * size,
        "params": int(2e6 * size), "seconds": {"training": 10.0, "scoring": 2.5},
    } | (first if parent is None else later) | changes  # fmt: skip


def candidate(number: int, parent: int | None = None, score: float = 0.4, ratio: float = 1.0, **changes: Any):
    """A candidate of an architecture of its own."""
    times = {"latency_p50": 20.0 * ratio, "base_latency_p50": 20.0, "latency_ratio": ratio}
    return Candidate(**known(number, score, ratio, parent, **changes), **times, latency_interval=(ratio, ratio))


def add(archive: Archive, number: int, score: float, ratio: float, parent: int | None = None, **changes: Any):
    """A candidate, timed once, or failed where `failure` is given."""
    environment = {"device": "cpu", "device_name": "a cpu", "threads": 1, "torch": "2.11"}
    environment |= {"runtime": "eager", "runtime_version": "2.11"}
    timing = None
    if "failure" not in changes:
        timing = Timing(f"spec {number}", "brief", environment, (20 * ratio,) * 4, (20.0,) * 4)
    return archive.add(timing, **known(number, score, ratio, parent, **changes))


def fill(archive: Archive, count: int = 24, seed: int = 0) -> None:
    """A base and candidates that get faster and recover; one in nine fails."""
    rng = random.Random(seed)
    add(archive, 0, 0.38, 1.0)
    for number in range(1, count):
        good = [one for one in archive.scored if one.number >= number - 10 or not one.number]
        parent = rng.choice(good)
        if number % 9 == 5:
            why = "the losses of step 31 are not finite; lower the lr."
            add(archive, number, math.nan, math.nan, parent.number, failure=why)
            continue
        kind = rng.choice(["morph", "morph", "teacher"])
        ratio = max(0.3, parent.latency_ratio * rng.uniform(0.78, 0.97)) if kind == "morph" else parent.latency_ratio
        score = parent.map + rng.gauss(0.004 if kind == "morph" else 0.014, 0.015)
        words = f"cut 3 of <stages.{number % 2}> & the neck" if kind == "morph" else "teacher changed"
        shape = CUT if ratio < 0.8 else ARCHITECTURE
        add(archive, number, score, ratio, parent.number, kind=kind, action=words, architecture=shape)


def entry(score: float, p50: float, ratio: float, steps: int, **more: Any) -> dict[str, Any]:
    """Scores of one network in a result."""
    return {
        "map": score, "map50": score * 1.7, "latency_ms": {"p50": p50, "p90": 1.1 * p50, "p99": 1.4 * p50},
        "latency_ratio": ratio, "latency_ratio_interval": [ratio - 0.01, ratio + 0.012], "params": int(1.8e6 * ratio),
        "gmacs": 0.41 * ratio, "train_steps": steps,
    } | more  # fmt: skip


def part(images: int, boxes: int, which: str) -> dict[str, Any]:
    where = {"image_folder": "data/val2017", "annotations": "data/instances_val2017.json"}
    return {**where, "which": which, "images": images, "boxes": boxes}


def result(candidates: list[Candidate]) -> dict[str, Any]:
    """A result with a student per target, chosen among candidates."""
    students = []
    for target in TARGETS:
        fast = [one for one in candidates if one.latency_ratio <= target]
        one = max(fast, key=lambda c: c.map) if fast else min(candidates, key=lambda c: c.latency_ratio)
        about = {"target": target, "target_met": bool(fast), "id": one.id, "folder": f"student-{target:g}"}
        students.append(entry(one.map + 0.01, one.latency_p50, one.latency_ratio, one.lineage_steps, **about))
    seconds = {"pool": 200.0, "candidates": 950.0, "control": 120.0, "timing": 130.0, "proposing": 60.0, "a walk": 9.0}
    spent = {"seconds": seconds, "candidate_seconds": {"training": 900.0, "scoring": 210.0, "timing": 130.0}}
    return {
        "base": entry(0.36, 20.0, 1.0, 400), "control": entry(0.40, 20.0, 1.0, 700), "students": students,
        "selection": part(50, 120, "half, the lower SHA-256 of image files"),
        "report": part(51, 130, "half, the higher SHA-256 of image files"), "seed": 0, "device": "cpu",
        "versions": {"torch": "2.11.0", "jdkd": "0.1.0"}, "command": ["jdkd", "search", "--base", "a folder"],
        "target_met": all(one["target_met"] for one in students), "aa": {"ratio": 1.002, "interval": [0.991, 1.014]},
        "fixed_share": 0.2,
        "predictor": {"kendall_tau": 0.91, "mean_absolute_percentage_error": 3.2, "architectures": 18},
        "cost": {"pool_steps": 300, "candidate_steps": 2300, "control_steps": 700, **spent},
    }  # fmt: skip


def teachers() -> list[dict[str, Any]]:
    """Members of a pool, a foreign one among them."""
    scores = zip(MEMBERS, (0.45, 0.43, 0.39), strict=True)
    members = [ScoredTeacher(subnet, score, 2_900_000) for subnet, score in scores]
    return [one.to_json() for one in (*members, ScoredTeacher("a foreign one", 0.51, 41_000_000))]


def levels_of(channels: int = 6, seed: int = 0):
    """Responses of two levels: the student's are the teacher's and noise, channel by channel more of it."""
    generator, levels = torch.Generator().manual_seed(seed), []
    for stride, (height, width) in ((8, (40, 60)), (16, (20, 30))):
        theirs = torch.randn(channels, height, width, generator=generator)
        share = torch.linspace(0, 1, channels)[torch.randperm(channels, generator=generator), None, None]
        ours = (1 - share) * theirs + share * torch.randn(theirs.shape, generator=generator)
        ours = (ours - ours.mean((1, 2), keepdim=True)) / ours.flatten(1).std(1)[:, None, None]
        levels.append(LevelResponses(stride, (ours * theirs).mean((1, 2)), ours, theirs, None))
    return levels


def make_search(folder: Path, *, finished: bool = True, count: int = 24, seed: int = 0) -> Path:
    """The folder of a made-up search."""
    RunFolder(folder).begin("search", {"targets": TARGETS}, command=["jdkd", "search", "--out", str(folder)])
    with closing(Archive(folder / "archive.sqlite")) as archive:
        fill(archive, count, seed)
        if finished:
            (folder / "result.json").write_text(json.dumps(result(archive.scored)))
    (folder / "teachers.json").write_text(json.dumps(teachers()))
    return folder
