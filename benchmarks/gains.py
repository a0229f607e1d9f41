"""What the students of a search are ahead of their bases and controls, with intervals over seeds and images.

python -m benchmarks.gains blood_cells_deep FOLDER    of the finished searches that `benchmarks.proof` left in FOLDER
python -m benchmarks.gains                            print the table of those that are kept

All are scored on the images that chose nothing. The intervals are of the bootstrap over seeds and images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import markdown, proof, record
from benchmarks.resampling import Judged, gain, gained
from jdkd.data import CocoDetectionDataset, resolve_splits
from jdkd.detect import load
from jdkd.latency import fuse_for_inference
from jdkd.search.selection import divide
from jdkd.train.evaluate import find

OP = "gains"
HEADINGS = ("searches", "seeds", "images", "student", "minus base (95 %)", "minus control (95 %)")


def reporting(name: str, folder: Path, seed: int) -> CocoDetectionDataset:
    """The images of one seed that chose nothing."""
    splits = resolve_splits(proof.images(proof.RECIPES[name], folder, None, seed))
    train, val = (CocoDetectionDataset(split) for split in splits)
    return divide(train, val)[1].dataset


def judged(name: str, folder: Path, seed: int) -> dict[str, Judged]:
    """The base, the control and the student of one seed, on the images that report."""
    report = reporting(name, folder, seed)
    search = folder / f"search-{seed}"
    places = {"base": folder / f"base-{seed}", "control": search / "control", "student": search / "student"}
    return {who: _judged(load(place, "cpu"), report) for who, place in places.items()}


def _judged(model: torch.nn.Module, report: CocoDetectionDataset) -> Judged:
    return Judged(report, find(fuse_for_inference(model.eval()), report, device="cpu", batch_size=8).close())


def row(name: str, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The gains of one kind of search."""
    found = [judged(name, folder, seed) for seed in seeds]
    made = {"op": OP, "searches": name, "seeds": list(seeds), "images": found[0]["student"].count}
    made["maps"] = {who: [each[who].map() for each in found] for who in found[0]}
    students = [each["student"] for each in found]
    made |= {f"less_{who}": gain(students, [each[who] for each in found]) for who in ("base", "control")}
    return made | {"device": record.device_name("cpu"), "commit": record.commit()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, the latest row of each kind of search."""
    lines = []
    for one in {each["searches"]: each for each in rows}.values():
        scores = " ".join(f"{value:.3f}" for value in one["maps"]["student"])
        cells = [one["searches"], str(len(one["seeds"])), str(one["images"]), scores]
        lines.append([*cells, *(gained(one[f"less_{who}"]) for who in ("base", "control"))])
    return markdown.table(HEADINGS, "lr", lines)


def main(arguments: Sequence[str]) -> None:
    asked = proof.of_finished(__doc__).parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        record.append(record.result_file("cpu", OP), [row(asked.name, asked.folder, asked.seeds)])
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
