"""What each part of the joint search is worth: the search with one part changed, at equal training steps, over seeds.

python -m benchmarks.ablations blood_cells_deep FOLDER --data DIR   every arm, seeds 0 to 2
python -m benchmarks.ablations digit_scenes_deep FOLDER --arms joint mse --seeds 0 1
python -m benchmarks.ablations                                      print the page of the results that are kept

The bases are those of `benchmarks.proof`, of which FOLDER may be the folder: its searches are the method's own arm. The
teacher pool of a seed is trained once and every arm is charged with it, so all arms spend the same steps; an arm that
has no pool trains its students for as many more. What "again" differs by is how far equal searches are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit

from benchmarks import markdown, proof, record
from benchmarks.proof import RECIPES, jdkd
from jdkd.data import resolve_splits
from jdkd.search import Method, SearchConfig, plan, search

OP = "ablations"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("the method", {}),
    "again": ("nothing: the method once more, with other random numbers", {}),
    "pipelined": ("NAS, then pruning, then distillation", {"order": "pipelined", "teaching": "fixed"}),
    "scratch": ("children begin with fresh weights", {"inherit": False}),
    "none": ("nobody teaches", {"teaching": "none"}),
    "base alone": ("the base alone teaches", {"teaching": "base"}),
    "fixed": ("the pool's best teaches throughout", {"teaching": "fixed"}),
    "separate": ("the base, trained on for the pool's steps, teaches throughout", {"teaching": "given"}),
    "mse": ("FitNets' loss instead of PKD's", {"imitation": "mse"}),
    "one cut": ("one large cut instead of several", {"gradual": False}),
    "gamma": ("channels are cut by gamma, and blocks leave by chance", {"criterion": "gamma"}),
    "magnitude": ("channels are cut by magnitude, and blocks leave by chance", {"criterion": "magnitude"}),
    "fisher": ("channels are cut by Fisher information", {"criterion": "fisher"}),
    "absolute": ("importance is of the losses' sum as it is", {"relative": False}),
    "relative": ("importance is of each loss over its own size", {"relative": True}),
}
OTHER = 100  # added to the seed of a base where its search is made again
POOLLESS = ("base alone", "none")  # arms that need no pool, and train their students on its steps


def run(name: str, folder: Path, data: Path | None, arm: str, seed: int) -> dict[str, Any]:
    """One arm of one seed, as a row; what is there already is not done again."""
    recipe, base, steps = RECIPES[name], folder / f"base-{seed}", RECIPES[name].budget
    own = joint = json.loads((proof.run(recipe, folder, data, seed) / "result.json").read_text())
    images = proof.images(recipe, folder, data, seed)
    if arm != "joint":
        method, out = Method(**ARMS[arm][1]), folder / f"{arm.replace(' ', '-')}-{seed}"
        how = {"batch_size": recipe.batch_size, "lr": recipe.lr, "amp": recipe.amp, "resume": True}
        how["seed"] = OTHER + seed if arm == "again" else seed
        config = SearchConfig(base, *resolve_splits(images), out, steps=steps, control=False, **how)
        pool, teachers = plan(config, steps).pool, ()
        if arm == "separate":
            teachers = (folder / f"teacher-{seed}",)
            jdkd("train", "--out", *teachers, "--model", base, "--steps", pool, *proof.flags(recipe, images, seed))
        if arm not in POOLLESS:
            config = replace(config, steps=steps - pool, teacher_pool=folder / f"search-{seed}" / "pool")
        config = replace(config, method=method, teachers=teachers)
        own = search(config)
    (student,) = own["students"]
    shown = ("map", "target", "latency_ratio", "latency_ratio_interval", "target_met", "train_steps", "params")
    return {
        "op": OP,
        "data": name,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "base": joint["base"]["map"],
        "control": joint["control"]["map"],
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
    """An arm a row, the mean over seeds, and its difference to the method, paired by seed, with Student's interval."""
    rows = list({(row["arm"], row["seed"]): row for row in rows}.values())
    joint = {row["seed"]: row["map"] for row in rows if row["arm"] == "joint"}
    less = "less the method's, paired (95 %)"
    headings = ("arm", "what differs", "seeds", "student mAP", less, "latency ratio")
    lines = []
    for arm, (what, _) in ARMS.items():
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        differences = [row["map"] - joint[row["seed"]] for row in own if row["seed"] in joint]
        less = "" if arm == "joint" else f"{spread(differences)}{interval(differences)}"
        ratio = statistics.mean(row["latency_ratio"] for row in own)
        lines.append((arm, what, len(own), spread([row["map"] for row in own]), less, f"{ratio:.3f}"))
    for name in ("base", "control"):
        values = [row[name] for row in rows if row["arm"] == "joint"]
        lines.append((name, "", len(values), spread(values), "", "1.000"))
    return markdown.table(headings, "llr", lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "not measured"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def interval(values: Sequence[float]) -> str:
    """The 95 % interval of the mean over seeds, by Student's t; nothing of a single one."""
    if len(values) < 2:
        return ""
    mean, count = statistics.mean(values), len(values)
    half = stdtrit(count - 1, 0.975) * statistics.stdev(values) / count**0.5
    return f" ({mean - half:+.3f} to {mean + half:+.3f})"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=proof.ONE_STUDENT, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, help="photographs in the COCO layout")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        file = record.result_file("cpu", OP)
        kept = record.load([file] if file.exists() else [])
        known = {(row["data"], row["arm"], row["seed"]) for row in kept}
        for arm in asked.arms:
            for seed in asked.seeds:
                if (asked.name, arm, seed) not in known:
                    row = run(asked.name, asked.folder, asked.data, arm, seed)
                    record.append(file, [row])
                    print(json.dumps(row), flush=True)
    print(page(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
