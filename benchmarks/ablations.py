"""What each part of the joint search is worth: the search with one part changed, at equal training steps, over seeds.

python -m benchmarks.ablations FOLDER                     every arm, seeds 0 to 2; carries on what FOLDER holds
python -m benchmarks.ablations FOLDER --arms joint mse    some arms; --seeds 0 1 2, --steps N, --target 0.53
python -m benchmarks.ablations                            print the page of the results that are kept

FOLDER gets digit scenes, a base for each seed, and a search for each arm and seed. The teacher pool of a seed is
trained once and every arm is charged with it, so all arms spend the same steps; an arm that has no pool trains its
students for as many steps more. The score is on images that neither trained nor selected.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import record
from jdkd.data import resolve_splits
from jdkd.search import Method, SearchConfig, plan, search

OP = "ablations"
DATA = "--train 700 --val 400 --size 96"
BASE = (
    "--model fcos --backbone resnet18 --norm batch --width 0.5 --fpn 64 --min-size 96 --max-size 96 --steps 1000 "
    "--lr 2e-3"
)
STEPS = 2000  # twice the base's training
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("the method", {}),
    "pipelined": ("NAS, then pruning, then distillation", {"order": "pipelined", "teaching": "fixed"}),
    "scratch": ("children begin with fresh weights", {"inherit": False}),
    "fixed": ("the pool's best teaches throughout", {"teaching": "fixed"}),
    "base": ("the base alone teaches", {"teaching": "base"}),
    "none": ("nobody teaches", {"teaching": "none"}),
    "mse": ("FitNets' loss instead of PKD's", {"imitation": "mse"}),
    "gamma": ("channels are cut by gamma", {"criterion": "gamma"}),
    "magnitude": ("channels are cut by magnitude", {"criterion": "magnitude"}),
    "fisher": ("channels are cut by Fisher information", {"criterion": "fisher"}),
    "one cut": ("one large cut instead of several", {"gradual": False}),
}
POOLLESS = ("base", "none")  # arms that need no pool, and train their students on its steps


def run(folder: Path, arm: str, seed: int, steps: int, target: float) -> dict[str, Any]:
    """One arm of one seed, as a row; what is there already is not done again."""
    data, base = folder / f"data-{seed}", folder / f"base-{seed}"
    _jdkd(f"data digits {data} {DATA} --seed {seed} --resume")
    _jdkd(f"train --data {data} --out {base} {BASE} --seed {seed} --resume")
    train, val = resolve_splits(data)
    config = SearchConfig(
        base, train, val, folder / f"joint-{seed}", targets=(target,), steps=steps, control=True, seed=seed, resume=True
    )
    result = search(config)  # every arm is taught by this one's pool
    if arm != "joint":
        charged = {"teacher_pool": config.out / "pool", "steps": steps - plan(config, steps).pool}
        pool = {} if arm in POOLLESS else charged
        method = Method(**ARMS[arm][1])
        out = folder / f"{arm.replace(' ', '-')}-{seed}"
        own = search(replace(config, out=out, method=method, control=False, **pool))
    else:
        own = result
    (student,) = own["students"]
    shown = ("map", "latency_ratio", "latency_ratio_interval", "target_met", "train_steps", "params")
    return {
        "op": OP,
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
    """A Markdown table: an arm a row, the mean over seeds, and its difference to the method, paired by seed."""
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


def _jdkd(command: str) -> None:
    subprocess.run([sys.executable, "-m", "jdkd", *command.split()], check=True, stdout=subprocess.DEVNULL)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--target", type=float, default=0.53)
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        file = record.result_file("cpu", OP)
        known = {
            (row["arm"], row["seed"], row["steps"], row["target"])
            for row in record.load([file] if file.exists() else [])
        }
        for seed in asked.seeds:
            for arm in asked.arms:
                if (arm, seed, asked.steps, asked.target) not in known:
                    row = run(asked.folder, arm, seed, asked.steps, asked.target)
                    record.append(file, [row])
                    print(json.dumps(row), flush=True)
    print(page(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
