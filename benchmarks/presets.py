"""Whether every published pair learns: each preset, narrowed until a CPU can train it, on digit scenes.

python -m benchmarks.presets FOLDER [NAME ...] [--seed N]   train what is missing, append a row for each pair
python -m benchmarks.presets                                print the table of the rows that are kept

Three commands for each pair, `jdkd distill --preset NAME --narrow SHARE` all of them: 200 steps in fp32 under a teacher
that is trained first for as many, no steps at all, which is the student as it begins, and 500 steps in bf16 under the
same teacher. The digits are of one class, which is learned in fewer steps. A loss is the mean of the first, or of the
last, three lines of the log (a line for step 1 and for every tenth). FOLDER keeps what was trained, and carries it on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.proof import jdkd
from jdkd.data import write_digit_scenes
from jdkd.detect import load
from jdkd.presets import preset_names

OP = "presets"
NARROW, BATCH = 0.125, 4  # share of channels and of 800x1333 pixels; images a step
SCENES = {"train": 200, "val": 100, "size": 96, "seed": 0, "one_class": True}
STEPS, HALF_STEPS = 200, 500  # in fp32 and in bf16
LINES = 3  # of the log, that a loss is the mean of
PKD = "loss_pkd"
HEADINGS = (
    "pair",
    "seed",
    "detection loss, first → last",
    "PKD, first → last",
    "mAP, first → last",
    "steps in bf16",
    "their loss, first → last",
    "mAP",
)
Row = dict[str, Any]


def row(name: str, folder: Path, seed: int = 0, share: float = NARROW) -> Row:
    """What became of one pair; what was interrupted is carried on.

    Args:
        name: of the preset.
        folder: for the scenes and for what is trained.
        seed: of everything.
        share: of channels and pixels that are kept.
    """
    data, own = folder / "digits", folder / f"{name}-{seed}"
    write_digit_scenes(data, **SCENES, resume=True)
    how = ("--preset", name, "--narrow", share, "--data", data, "--batch-size", BATCH, "--seed", seed, "--resume")
    teacher = ("--teacher", own / "learning" / "teacher")
    jdkd("distill", "--out", own / "learning", *how, "--steps", STEPS)
    jdkd("distill", "--out", own / "untaught", *how, *teacher, "--steps", 0)
    jdkd("distill", "--out", own / "half", *how, *teacher, "--steps", HALF_STEPS, "--amp", "bf16")
    made = {"op": OP, "preset": name, "narrow": share, "seed": seed, "batch_size": BATCH, **SCENES}
    made |= {"map_first": _map(own / "untaught"), "map": _map(own / "learning"), **ends(_log(own / "learning"))}
    half = _log(own / "half")
    made["half"] = {"map": _map(own / "half"), **ends(half), "finite": finite(own / "half", half)}
    return made | {"device": record.device_name("cpu"), "commit": record.commit()}


def ends(log: Sequence[Row]) -> Row:
    """How a training's losses began and ended, by the lines of its log.

    Returns:
        ``steps``, and for ``losses`` (those of the detector) and ``pkd`` a list of the first and the last.
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

    (Where the loss or the gradient of a step is not, logged or not, a training ends with an error.)
    """
    numbers = [number for line in log for number in (line["grad_norm"], *line["losses"].values())]
    logged = all(number is not None and math.isfinite(number) for number in numbers)
    return logged and all(bool(tensor.isfinite().all()) for tensor in load(folder, "cpu").state_dict().values())


def learns(one: Row) -> bool:
    """Whether both losses of a pair fell and its mAP rose."""
    return all(last < first for first, last in (one["losses"], one["pkd"], (-one["map_first"], -one["map"])))


def table(rows: Iterable[Row]) -> str:
    """A sentence that says how many pairs learned, and a Markdown table: the latest row of each pair and seed."""
    latest = [*{(one["preset"], one["seed"]): one for one in rows}.values()]
    latest.sort(key=lambda one: (one["preset"], one["seed"]))
    if not latest:
        return "Not measured."
    known = preset_names()
    runs = {name: [one for one in latest if one["preset"] == name] for name in known}
    learned = [name for name in known if runs[name] and all(map(learns, runs[name]))]
    whole = [name for name in known if runs[name] and all(one["half"]["finite"] for one in runs[name])]
    kept = f"{latest[0]['narrow']:g} of its channels and of its 800x1333 pixels"
    lines = [
        f"**Loss falls and mAP rises over {latest[0]['steps']} steps on {len(learned)} of {len(known)} pairs; "
        f"{latest[0]['half']['steps']} steps in bf16 are finite on {len(whole)} of {len(known)}.** Of each pair "
        f"{kept} are kept, and {latest[0]['batch_size']} images a step; on {latest[0]['device']}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "| --- | " + " | ".join(["---:"] * (len(HEADINGS) - 1)) + " |",
    ]
    return "\n".join([*lines, *map(_line, latest)])


def _line(one: Row) -> str:
    half = one["half"]
    cells = [one["preset"], str(one["seed"]), _both(one["losses"]), _both(one["pkd"])]
    cells += [f"{one['map_first']:.3f} → {one['map']:.3f}"]
    cells += [f"{half['steps']}, {'all finite' if half['finite'] else 'not finite'}"]
    score, both = f"{half['map']:.3f}", [sum(parts) for parts in zip(half["losses"], half["pkd"], strict=True)]
    return f"| {' | '.join([*cells, _both(both), score])} |"


def _both(ends: Sequence[float]) -> str:
    return " → ".join(f"{value:.2f}" for value in ends)


def _map(folder: Path) -> float:
    return float(json.loads((folder / "distill.json").read_text(encoding="utf-8"))["map"])


def _log(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the rows [that of this machine among the results]")
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        torch.set_num_threads(1)
        file = asked.out or record.result_file("cpu", OP)
        record.require_published(file)
        for name in asked.names or preset_names():
            record.append(file, [made := row(name, asked.folder, asked.seed)])
            print(_line(made), flush=True)
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
