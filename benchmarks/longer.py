"""What it would take: students of finished searches, trained on from their end, without a teacher.

python -m benchmarks.longer digit_scenes_deep FOLDER --seeds 0 1   of searches that `benchmarks.proof` left in FOLDER
python -m benchmarks.longer digit_scenes_deep_long FOLDER --train-sizes 160 176 192 208 224    at several image sizes
python -m benchmarks.longer                                        print the table of those that are kept

A student takes as many steps again as its lineage had, in a learning-rate cycle of their own, on the search's training
images and settings, unless others are given; all mAP is of the images that chose nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gains, markdown, proof, record
from jdkd.detect import load
from jdkd.latency import fuse_for_inference
from jdkd.train import evaluate

OP = "longer"
HEADINGS = ("searches", "seed", "base", "control", "student", "steps", "trained on", "steps", "at sizes")


def row(name: str, folder: Path, seed: int, sizes: Sequence[int] = ()) -> dict[str, Any]:
    """One student, trained on; a training that was interrupted is carried on."""
    recipe, search, out = proof.RECIPES[name], folder / f"search-{seed}", folder / f"longer-{seed}"
    if sizes:
        recipe = replace(recipe, sizes=" ".join(map(str, sizes)))
        out = folder / f"longer-{'-'.join(map(str, sizes))}-{seed}"
    result = json.loads((search / "result.json").read_text())
    (student,) = result["students"]
    data = proof.images(recipe, folder, None, seed)
    how = ("--model", search / student["folder"], "--steps", student["train_steps"])
    proof.jdkd("train", "--out", out, *how, *proof.flags(recipe, data, seed))
    trained = fuse_for_inference(load(out, "cpu").eval())
    scores = evaluate(trained, gains.reporting(name, folder, seed), device="cpu", batch_size=recipe.batch_size)
    known = {who: result[who]["map"] for who in ("base", "control")} | {"student": student["map"]}
    made = {"op": OP, "searches": name, "seed": seed, **known, "steps": student["train_steps"], "longer": scores.map}
    made |= {"sizes": list(sizes)} if sizes else {}
    return made | {"device": record.device_name("cpu"), "commit": record.commit()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, the latest row of each seed and of all sizes."""
    lines = []
    for one in {(each["searches"], each["seed"], str(each.get("sizes"))): each for each in rows}.values():
        scores = [f"{one[who]:.3f}" for who in ("base", "control", "student")]
        steps, sizes = one["steps"], " ".join(map(str, one.get("sizes", ["its own"])))
        lines.append([one["searches"], one["seed"], *scores, steps, f"{one['longer']:.3f}", 2 * steps, sizes])
    return markdown.table(HEADINGS, "lr", lines)


def main(arguments: Sequence[str]) -> None:
    parser = proof.of_finished(__doc__)
    parser.add_argument("--train-sizes", nargs="+", type=int, default=(), help="short sides in pixels of its images")
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        for seed in asked.seeds:
            record.append(record.result_file("cpu", OP), [row(asked.name, asked.folder, seed, asked.train_sizes)])
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
