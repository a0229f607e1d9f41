"""The latency harness against itself: ``python -m benchmarks.itself``.

A detector, itself again (A/A) and itself with a wait of 5 % of its own time take turns, in many short measurements on
this machine as it is. The harness is right where the interval of A/A contains 1 and the slowdown is found. One row a
measurement is appended as soon as it is made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import markdown, record
from jdkd.errors import InputError
from jdkd.latency import LatencyReport, measure
from tests.export.tiny import made, pictures

OP = "itself"
RUNS, HOLD, FIND = 20, 19, 17  # measurements, and of how many A/A is to hold and the slowdown to be found
SLOWDOWN = 1.05
SCHEDULE = {"rounds": 100, "min_seconds": 0, "warmup_seconds": 0, "warmup_limit": 2}


class Waiting(nn.Module):
    """A detector that, having found what it finds, computes for some seconds of processor time."""

    def __init__(self, detector: nn.Module, seconds: float = 0.0) -> None:
        super().__init__()
        self.detector, self.seconds = detector, seconds

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = self.detector(images)
        until = time.thread_time() + self.seconds  # work, which takes longer on a busy machine as the detector's does
        while time.thread_time() < until:
            pass
        return found


def reports(runs: int = RUNS, **schedule: Any) -> Iterator[LatencyReport]:
    """Measurements of a small FCOS and of a ``student`` that is 5 % slower."""
    detector, images = made("fcos"), pictures((96, 128))
    with torch.inference_mode():
        taken = []
        for _ in range(50):
            begin = time.thread_time()
            detector([images[0] / 255])
            taken.append(time.thread_time() - begin)
    models = {"base": Waiting(detector), "student": Waiting(detector, (SLOWDOWN - 1) * statistics.median(taken))}
    for model in models.values():
        model.eval()
    for _ in range(runs):
        yield measure(models, images, modes=("end_to_end",), **SCHEDULE | schedule)


def row(report: LatencyReport) -> record.Row:
    control, student = report.control_ratio(), report.ratio("student")
    return {
        "op": OP,
        "control": [control.value, control.low, control.high],
        "holds": report.control_holds(),
        "student": [student.value, student.low, student.high],
        "verdict": report.verdict("student"),
        "ms": report.models["base"].modes()["end_to_end"].p50,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": record.device_name("cpu"),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
        "commit": record.commit(),
    }


def table(given: Sequence[record.Row]) -> str:
    """Markdown: a line for what was measured of one commit on a machine."""
    heads = "machine", "load", "measurements", "A/A contains 1", "a slowdown of 5 % is found"
    sets, lines = dict[tuple[str, str], list[record.Row]](), []
    for row in given:
        sets.setdefault((row["device"], row["commit"]), []).append(row)
    for (device, _), own in sets.items():
        loads, planted = [row["load"] for row in own], [row["verdict"] for row in own if row["verdict"]]
        found = f"{planted.count('slower')} of {len(planted)}" if planted else "not measured"
        load = f"{min(loads):.1f} to {max(loads):.1f}"
        lines.append([device, load, len(own), sum(row["holds"] for row in own), found])
    return markdown.table(heads, "lr", lines)


def verdict(found: Sequence[record.Row]) -> str:
    """Whether that is as often as is asked of the harness, `HOLD` and `FIND` of `RUNS`, in a sentence."""
    holds, finds = sum(row["holds"] for row in found), sum(row["verdict"] == "slower" for row in found)
    enough = holds * RUNS >= HOLD * len(found) and finds * RUNS >= FIND * len(found)
    return (
        f"{'as asked' if enough else 'NOT as asked'}: A/A contains 1 in {holds} of {len(found)} ({HOLD} of {RUNS} are "
        f"asked for), a slowdown of 5 % is found in {finds} ({FIND})"
    )


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/DEVICE/itself.jsonl")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    out = asked.out or record.result_file("cpu", OP)
    record.require_published(out)
    found = []
    for report in reports(asked.runs):
        found.append(row(report))
        record.append(out, found[-1:])
        print(f"A/A {report.control_ratio()}, 5 % slower {report.ratio('student')}: {found[-1]['verdict']}", flush=True)
    print(verdict(found))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"{error}")
