"""Whether every published pair learns: each preset, narrowed until a CPU can train it, on digit scenes.

python -m benchmarks.presets FOLDER [NAME ...]    train what is missing, append a row for each training
python -m benchmarks.presets FOLDER --amp bf16    the second training alone
python -m benchmarks.presets                      print the table of the rows that are kept

Two trainings of each pair by `jdkd distill --preset NAME --narrow SHARE`: 200 steps in fp32 under a teacher that is
trained before, and 500 steps in bf16 under the same one. The digits are of one class, which is learned in fewer steps.
A loss is the mean of the first, or of the last, three lines of the log, which has one for step 1 and for every tenth.
FOLDER keeps what was trained, and carries it on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import markdown, record
from jdkd.cli import main as jdkd
from jdkd.cli.detectors import DetectorFlags
from jdkd.data import CocoDetectionDataset, resolve_split, write_digit_scenes
from jdkd.detect.checkpoint import WEIGHTS
from jdkd.latency import fuse_for_inference
from jdkd.presets import preset, preset_names
from jdkd.train import evaluate

OP = "presets"
NARROW = 0.125  # share of channels and of 800x1333 pixels that is kept
SCENES = {"train": 200, "val": 50, "size": 96, "seed": 0, "one_class": True}
TEACHER_STEPS = 100
LINES = 3  # of the log, that a loss is the mean of
PKD = "loss_pkd"
HEADINGS = ("pair", "detection loss", "PKD", "mAP", "500 steps in bf16", "detection loss", "PKD")
Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One of the two trainings of a pair: steps, and images in each."""

    steps: int
    batch_size: int


TRAININGS = {"off": Training(200, 4), "bf16": Training(500, 2)}  # by --amp


def row(name: str, amp: str, folder: Path, share: float = NARROW) -> Row:
    """What became of one training of a pair; one that was interrupted is carried on.

    Args:
        name: of the preset.
        amp: key of :data:`TRAININGS`; of ``bf16``, whose teacher the other trains, the other must have been finished.
        folder: for the scenes and for what is trained.
        share: of channels and pixels that are kept.
    """
    data, own, how = folder / "digits", folder / name, TRAININGS[amp]
    write_digit_scenes(data, **SCENES, resume=True)
    teacher = {"off": ("--teacher-steps", TEACHER_STEPS), "bf16": ("--teacher", own / "off" / "teacher")}[amp]
    words = ("--preset", name, "--narrow", share, "--data", data, "--out", own / amp, "--amp", amp, *teacher)
    words = (*words, "--steps", how.steps, "--batch-size", how.batch_size, "--device", "cpu", "--resume")
    if jdkd(["distill", *map(str, words)]):
        raise SystemExit(f"{name} did not end with --amp {amp}; what is wrong is said above")
    log = [json.loads(line) for line in (own / amp / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    made: Row = {"op": OP, "preset": name, "amp": amp, "narrow": share, "batch_size": how.batch_size, "seed": 0}
    made |= {"map_first": untaught(name, data, share)} if amp == "off" else {}
    made |= {"map": json.loads((own / amp / "distill.json").read_text(encoding="utf-8"))["map"], **ends(log)}
    made |= {"finite": finite(own / amp, log), "scenes": SCENES, "teacher_steps": TEACHER_STEPS}
    return made | {"device": record.device_name("cpu"), "commit": record.commit()}


def untaught(name: str, data: Path, share: float) -> float:
    """mAP of a pair's student before its first step."""
    chosen, val = preset(name), CocoDetectionDataset(resolve_split("val", data))
    sizes = {side: round(share * getattr(chosen, side)) for side in ("min_size", "max_size")}
    student, _ = DetectorFlags(width=share, **sizes).built(chosen.student, val.classes, seed=0)
    return evaluate(fuse_for_inference(student.eval()), val, device="cpu").map


def ends(log: Sequence[Row]) -> Row:
    """How a training's losses began and ended, by the lines of its log.

    Returns:
        ``steps``, and for ``losses`` (those of the detector, summed) and ``pkd`` a list of the first and the last.
    """
    parts = (log[:LINES], log[-LINES:])
    own = [[sum(value for name, value in line["losses"].items() if name != PKD) for line in part] for part in parts]
    pkd = [[line["losses"][PKD] for line in part] for part in parts]
    return {
        "steps": log[-1]["step"],
        "losses": [round(sum(each) / len(each), 4) for each in own],
        "pkd": [round(sum(each) / len(each), 4) for each in pkd],
    }


def finite(folder: Path, log: Sequence[Row]) -> bool:
    """Whether all that was logged of a finished training is finite, norms of gradients too, and all that was saved.

    (Where the loss or the gradient of a step is not, logged or not, a training on a CPU ends with an error there.)
    """
    numbers = [number for line in log for number in (line["grad_norm"], *line["losses"].values())]
    logged = all(number is not None and math.isfinite(number) for number in numbers)
    return logged and all(bool(tensor.isfinite().all()) for tensor in load_file(folder / WEIGHTS).values())


def learns(one: Row) -> bool:
    """Whether both losses of a pair fell and its mAP rose."""
    return all(last < first for first, last in (one["losses"], one["pkd"])) and one["map"] > one["map_first"]


def table(rows: Iterable[Row]) -> str:
    """A sentence that says how many pairs learned, and a Markdown table: the latest rows of each pair."""
    latest = {(one["preset"], one["amp"]): one for one in rows}
    if not latest:
        return "Not measured."
    known = preset_names()
    taught, halves = ([found for name in known if (found := latest.get((name, amp)))] for amp in TRAININGS)
    learned, whole = _count(map(learns, taught)), _count(one["finite"] for one in halves)
    (off, half), one = TRAININGS.values(), next(iter(latest.values()))
    lines = [
        f"**Both losses fall and mAP rises over {off.steps} steps of {off.batch_size} images on {learned} pairs; "
        f"{half.steps} steps of {half.batch_size} images in bf16 are finite on {whole}**; the published pairs are "
        f"{len(known)}. Of channels and of 800x1333 pixels {one['narrow']:g} is kept; one seed; on {one['device']}.",
        "",
        markdown.table(HEADINGS, "lr", (_cells(name, latest) for name in known if _of(latest, name))),
    ]
    return "\n".join(lines)


def _count(good: Iterable[bool]) -> str:
    """How many are, of those that were measured."""
    found = [*good]
    return f"{sum(found)} of {len(found)} measured"


def _of(latest: dict[tuple[str, str], Row], name: str) -> dict[str, Row]:
    return {amp: latest[name, amp] for amp in TRAININGS if (name, amp) in latest}


def _cells(name: str, latest: dict[tuple[str, str], Row]) -> list[str]:
    found, unknown = _of(latest, name), "not measured"
    off, half = (found.get(amp) for amp in TRAININGS)
    cells = (
        [_both(off["losses"]), _both(off["pkd"]), _both((off["map_first"], off["map"]), 3)] if off else [unknown] * 3
    )
    state = "all finite" if half and half["finite"] else "not finite"
    cells += [state, _both(half["losses"]), _both(half["pkd"])] if half else [unknown] * 3
    return [name, *cells]


def _both(ends: Sequence[float], digits: int = 2) -> str:
    return " → ".join(f"{value:.{digits}f}" for value in ends)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--amp", nargs="+", choices=[*TRAININGS], default=[*TRAININGS])
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        file = record.result_file("cpu", OP)
        record.require_published(file)
        for amp in asked.amp:
            for name in asked.names or preset_names():
                record.append(file, [row(name, amp, asked.folder)])
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
