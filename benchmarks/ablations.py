"""What each part of the joint search is worth: the search with one part changed, at equal training steps, over seeds.

python -m benchmarks.ablations FOLDER --data DIR          every arm, seeds 0 to 2; carries on what FOLDER holds
python -m benchmarks.ablations FOLDER                     the same on digit scenes
python -m benchmarks.ablations FOLDER --arms joint mse    some arms; --seeds 0 1 2, --steps N, --target 0.53
python -m benchmarks.ablations                            print the page of the results that are kept

Photographs in the COCO layout are halved, and of those to train on some select instead; all that validate report.
FOLDER gets a base for each seed, and a search for each arm and seed. The teacher pool of a seed is trained once and
every arm is charged with it, so all arms spend the same steps; an arm that has no pool trains its students for as many
more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.proof import halved
from jdkd.data import Split, resolve_splits
from jdkd.search import Method, SearchConfig, plan, search

OP = "ablations"
DIGITS = "--train 400 --val 400 --size 128"
SELECTING = 40  # photographs
SIZES = {"digit_scenes": "--min-size 128 --max-size 128", "photographs": "--min-size 96 --max-size 128"}
BASE = "--model fcos --backbone resnet18 --norm batch --width 0.5 --fpn 64"
TRAINING = "--batch-size 4 --lr 2e-3 --amp bf16"
STEPS = 2400  # of a search; its base has half of them
TARGET = 0.53
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("the method", {}),
    "pipelined": ("NAS, then pruning, then distillation", {"order": "pipelined", "teaching": "fixed"}),
    "scratch": ("children begin with fresh weights", {"inherit": False}),
    "none": ("nobody teaches", {"teaching": "none"}),
    "base": ("the base alone teaches", {"teaching": "base"}),
    "fixed": ("the pool's best teaches throughout", {"teaching": "fixed"}),
    "separate": ("the base, trained on for the pool's steps, teaches throughout", {"teaching": "given"}),
    "mse": ("FitNets' loss instead of PKD's", {"imitation": "mse"}),
    "one cut": ("one large cut instead of several", {"gradual": False}),
    "gamma": ("channels are cut by gamma", {"criterion": "gamma"}),
    "magnitude": ("channels are cut by magnitude", {"criterion": "magnitude"}),
    "fisher": ("channels are cut by Fisher information", {"criterion": "fisher"}),
}
POOLLESS = ("base", "none")  # arms that need no pool, and train their students on its steps


def splits(folder: Path, data: Path | None, seed: int) -> tuple[Path, Split, Split, Split | None]:
    """Where the images are, what to train on, what reports, and what selects; None where half of what reports does."""
    if data is None:
        data = folder / f"data-{seed}"
        _jdkd("data", "digits", data, *DIGITS.split(), "--seed", seed, "--resume")
        return data, *resolve_splits(data), None
    data = halved(data, folder / "photographs")
    train, val = resolve_splits(data)
    content = json.loads(train.annotations.read_text())
    parts = {"train": content["images"][SELECTING:], "selection": content["images"][:SELECTING]}
    found = {}
    for name, images in parts.items():
        ids = {image["id"] for image in images}
        own = [one for one in content["annotations"] if one["image_id"] in ids]
        file = folder / f"{name}.json"
        file.write_text(json.dumps(content | {"images": images, "annotations": own}))
        found[name] = Split(train.images, file, name)
    return data, found["train"], val, found["selection"]


def run(folder: Path, data: Path | None, arm: str, seed: int, steps: int, target: float) -> dict[str, Any]:
    """One arm of one seed, as a row; what is there already is not done again."""
    where, train, val, selection = splits(folder, data, seed)
    name = "digit_scenes" if data is None else "photographs"
    base, common = folder / f"base-{seed}", [*TRAINING.split(), "--seed", seed, "--resume"]
    common = ["--data", where, "--train-annotations", train.annotations, *common]
    _jdkd("train", "--out", base, *BASE.split(), *SIZES[name].split(), "--steps", steps // 2, *common)
    how = {"targets": (target,), "steps": steps, "batch_size": 4, "lr": 2e-3, "amp": "bf16", "seed": seed}
    config = SearchConfig(base, train, val, folder / f"joint-{seed}", selection, resume=True, **how)
    own = result = search(config)  # every arm is taught by this one's pool
    if arm != "joint":
        left = plan(config, steps).pool
        method, extra = Method(**ARMS[arm][1]), {}
        if arm not in POOLLESS:
            extra = {"teacher_pool": config.out / "pool", "steps": steps - left}
        if arm == "separate":
            teacher = folder / f"teacher-{seed}"
            _jdkd("train", "--out", teacher, "--model", base, "--steps", left, *common)
            extra["teachers"] = (teacher,)
        out = folder / f"{arm.replace(' ', '-')}-{seed}"
        own = search(replace(config, out=out, method=method, control=False, **extra))
    (student,) = own["students"]
    shown = ("map", "latency_ratio", "latency_ratio_interval", "target_met", "train_steps", "params")
    return {
        "op": OP,
        "data": name,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "target": target,
        "base": result["base"]["map"],
        "control": result["control"]["map"],
        **{name: student[name] for name in shown},
        "seconds": own["cost"]["seconds"],
        "device": own["device"]["device_name"],
        "threads": own["device"]["threads"],
        "commit": record.commit(),
    }


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown tables, one for each kind of data."""
    return "\n\n".join(
        f"### {name}\n\n{table([row for row in rows if row['data'] == name])}"
        for name in dict.fromkeys(row["data"] for row in rows)
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """An arm a row, the mean over seeds, and its difference to the method, paired by seed."""
    rows = list({(row["arm"], row["seed"]): row for row in rows}.values())
    joint = {row["seed"]: row["map"] for row in rows if row["arm"] == "joint"}
    lines = ["| arm | what differs | seeds | student mAP | less the method's, paired | latency ratio |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for arm, (what, _) in ARMS.items():
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        differences = [row["map"] - joint[row["seed"]] for row in own if row["seed"] in joint]
        less = "" if arm == "joint" else spread(differences)
        ratio = statistics.mean(row["latency_ratio"] for row in own)
        lines.append(f"| {arm} | {what} | {len(own)} | {spread([row['map'] for row in own])} | {less} | {ratio:.3f} |")
    for name in ("base", "control"):
        values = [row[name] for row in rows if row["arm"] == "joint"]
        lines.append(f"| {name} | | {len(values)} | {spread(values)} | | 1.000 |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "not measured"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _jdkd(*words: object) -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "jdkd", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | threads)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, help="photographs in the COCO layout")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--target", type=float, default=TARGET)
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        asked.folder.mkdir(parents=True, exist_ok=True)
        file, name = record.result_file("cpu", OP), "digit_scenes" if asked.data is None else "photographs"
        kept = record.load([file] if file.exists() else [])
        known = {(row["data"], row["arm"], row["seed"], row["steps"], row["target"]) for row in kept}
        for seed in asked.seeds:
            for arm in asked.arms:
                if (name, arm, seed, asked.steps, asked.target) not in known:
                    row = run(asked.folder, asked.data, arm, seed, asked.steps, asked.target)
                    record.append(file, [row])
                    print(json.dumps(row), flush=True)
    print(page(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
