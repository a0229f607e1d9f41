"""The one process of all benchmarks: parts of cases in order of worth, each with seconds after which no case begins.

    python -m benchmarks.gpu.timed --device cuda --kernels kernels.jsonl --latency latency.jsonl pearson:107 pack:9

Rows are appended as soon as a case is done. A provider that is wrong is named and left out, the others are timed. On a
CPU the same parts have tiny cases: a rehearsal.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from benchmarks import goals, harness, latency, record, run
from benchmarks.cases import (
    elastic_conv,
    elastic_levels,
    elastic_pointwise,
    pack,
    pearson,
    subnet_change,
    supernet_step,
)
from benchmarks.conv_shapes import P6, P7
from benchmarks.gpu.jobs import tell
from benchmarks.gpu.plan import TIMED
from benchmarks.harness import Case
from benchmarks.ladder import Ladder, fresh

SECONDS = {"cuda": 1.5, "cpu": 0.0}  # of the rounds of a case
RUNGS_BY_WORTH = (0.5, 0.3, 0.7, 0.9, 0.4, 0.6, 0.8)
LOST = 4  # exit code where the device takes no more calls
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
NCHW, LAST = "NCHW", "channels-last"
Made = Callable[[], Case]


def without(case: Case, names: Collection[str]) -> Case:
    """The case without some providers."""
    kept = {name: provider for name, provider in case.providers.items() if name not in names}
    return dataclasses.replace(case, providers=kept)


def cases(part: str, device: str) -> list[Made]:
    """What makes the cases of a part, in order of worth."""
    if device == "cpu":
        return REHEARSED[part]()
    return {
        "pearson": _pearson,
        "pack": _pack,
        "pointwise and levels": _pointwise_and_levels,
        "conv": _conv,
        "supernet": _supernet,
        "compile": _compiled,
    }[part]()


def _pearson() -> list[Made]:
    """Those with goals first; eager is the only baseline."""
    chosen = [(16, BF16, NCHW, mode) for mode in ("forward+backward", "tap")]
    chosen += [(2, BF16, NCHW, "forward+backward"), (16, BF16, NCHW, "forward"), (2, BF16, NCHW, "tap")]
    chosen += [(16, BF16, LAST, mode) for mode in ("tap", "forward+backward", "forward")]
    chosen += [(2, BF16, LAST, "forward+backward"), (2, FP32, NCHW, "forward+backward"), (2, FP16, NCHW, "tap")]
    chosen += [(16, FP32, NCHW, "forward+backward"), (2, FP32, NCHW, "tap"), (2, FP16, LAST, "tap")]
    return [
        lambda images=images, dtype=dtype, layout=layout, mode=mode: pearson.case(
            "P3-P7", images, dtype, layout, mode, "cuda"
        )
        for images, dtype, layout, mode in chosen
    ]


def _pack() -> list[Made]:
    large = "37.9M of ResNet-101"
    return [
        lambda layout=layout, mode=mode: pack.case(0.5, BF16, layout, mode, "cuda", network=large)
        for layout in (LAST, NCHW)
        for mode in ("forward", "unpack")
    ]


def _pointwise_and_levels() -> list[Made]:
    """The 1x1 convolutions in evaluation and the grouped levels take turns."""

    def pointwise(label: str) -> Made:
        return lambda: without(elastic_pointwise.case(label, 0.5, BF16, "evaluation", "cuda"), ["torch.compile"])

    def levels(pyramid: str, images: int) -> Made:
        return lambda: elastic_levels.case(pyramid, 0.5, BF16, "forward", "cuda", images)

    turns = [levels("P5-P7", 2), levels("P2-P6", 2), levels("P5-P7", 1), levels("P2-P6", 1)]
    return [made for pair in zip(map(pointwise, elastic_pointwise.LAYERS), turns, strict=True) for made in pair]


def _conv() -> list[Made]:
    """3x3 at half width: what carries a goal, of the levels of a pyramid."""
    chosen = [(elastic_conv.P3, 2), (elastic_conv.P4, 2), (elastic_conv.P5, 2), (elastic_conv.P5, 1), (P6, 2), (P7, 2)]
    chosen += [(elastic_conv.P3, 1), (elastic_conv.P4, 1), (P6, 1), (P7, 1)]
    return [
        lambda label=label, images=images: elastic_conv.case(label, 0.5, False, BF16, "forward", "cuda", images)
        for label, images in chosen
    ]


def _supernet() -> list[Made]:
    return [
        lambda: supernet_step.case(supernet_step.R50, supernet_step.WHOLE, BF16, "cuda"),
        lambda: without(
            subnet_change.case(subnet_change.R18, subnet_change.SMALL, BF16, "cuda"), ["jdkd torch.compile"]
        ),
    ]


def _compiled() -> list[Made]:
    """What takes long to begin: compiled baselines, beside eager and ours once more, so that they take turns."""
    compiled: dict[str, pearson.Loss] = {}

    def loss(mode: str, layout: str, images: int) -> Made:
        def made() -> Case:
            compiled.update(compiled or pearson.compiled())  # once: it forgets what was compiled before
            return pearson.case("P3-P7", images, BF16, layout, mode, "cuda", compiled)

        return made

    return [
        loss("forward+backward", NCHW, 16),
        loss("tap", NCHW, 16),
        *(
            lambda label=label: elastic_pointwise.case(label, 0.5, BF16, "evaluation", "cuda")
            for label in elastic_pointwise.LAYERS
        ),
        loss("forward+backward", LAST, 16),
        lambda: subnet_change.case(subnet_change.R18, subnet_change.SMALL, BF16, "cuda"),
    ]


REHEARSED: dict[str, Callable[[], list[Made]]] = {
    "pearson": lambda: [
        lambda mode=mode: pearson.case("P7", 1, FP32, NCHW, mode, "cpu") for mode in ("forward+backward", "tap")
    ],
    "pack": lambda: [lambda: pack.case(0.25, FP32, NCHW, "forward", "cpu")],
    "pointwise and levels": lambda: [
        lambda: without(
            elastic_pointwise.case("layer4 1x1 512->2048", 0.25, FP32, "evaluation", "cpu", 1), ["torch.compile"]
        ),
        lambda: elastic_levels.case("P5-P7", 0.25, FP32, "forward", "cpu", 1),
    ],
    "conv": lambda: [lambda: elastic_conv.case(P7, 0.5, False, FP32, "forward", "cpu", 1)],
    "supernet": lambda: [
        lambda: dataclasses.replace(
            supernet_step.case(supernet_step.R18, (64, 64), FP32, "cpu", images=1, width=0.125), tiny=None
        )
    ],
    "compile": lambda: [lambda: pearson.case("P7", 1, FP32, NCHW, "forward", "cpu")],
}


class Parts:
    """Times parts, one after the other.

    Args:
        device: ``cpu`` or ``cuda``.
        kernels, latencies: files of rows.
    """

    def __init__(self, device: str, kernels: Path, latencies: Path) -> None:
        self.device, self.kernels, self.latencies = device, kernels, latencies
        self.common = record.environment(device, harness.copy_bandwidth(device))

    def follow(self, part: str, until: float, skipped: int) -> None:
        """Times the cases of a part that begin in time.

        Args:
            part: of :data:`benchmarks.gpu.plan.TIMED`.
            until: when the part is over, a time of the monotonic clock.
            skipped: cases to pass over.
        """
        if part == "latency":
            return self.latency(part, until, skipped)
        done, left, longest = [], [], 0.0
        for made in cases(part, self.device)[skipped:]:
            case, begin = made(), time.monotonic()
            if begin + longest > until:
                left.append(str(case))
                continue
            tell(part=part, case=str(case))
            done += self.case(part, case)
            longest = max(longest, time.monotonic() - begin)
        tell(end=part, part=part, left=left, goals=told(done) if self.device == "cuda" else "")

    def case(self, part: str, case: Case) -> list[record.Row]:
        """Times one case. Returns: its rows."""
        try:
            rows, wrong = run.timed(case, self.device, SECONDS[self.device], self.common, [self.kernels])
        except Exception as error:  # the exact result, or the inputs: whatever a case raises is its own
            rows, wrong = [], {"the case": f"{type(error).__name__}: {error}"}
        for name, why in wrong.items():
            tell(part=part, failed=f"{case}: {name}", why=why)
        if wrong and self.device == "cuda":
            self.check_device()
        return rows

    def check_device(self) -> None:
        """Ends the process where the device takes no more calls of it: the next one begins behind this case."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the context is lost: {error}", flush=True)
            sys.exit(LOST)

    def latency(self, part: str, until: float, skipped: int) -> None:
        """R101-FPN at 800x1333 and students cut from it, some rungs of the ladder in one mode after the other."""
        gpu = self.device == "cuda"
        name, size = ("faster_rcnn_r101_fpn", (800, 1333)) if gpu else ("faster_rcnn_r18_fpn", (64, 64))
        rungs, together = (RUNGS_BY_WORTH, 4) if gpu else ((0.5,), 1)
        amount = {"rounds": 30, "seconds": 3.0, "warmup_seconds": 1.5}
        grid = latency.grid_of(**(amount if gpu else dict.fromkeys(amount, 0) | {"rounds": 1}))
        if not skipped:
            tell(part=part, case="latency")
            models = Ladder(name, fresh(name, size).to(self.device), size, rungs)
            left = latency.turns(models, grid, together)
            for rows in latency.measured(models, left, size, self.device, "random"):
                record.append(self.latencies, rows)
                print("\n".join(map(latency.line, rows)), flush=True)
                if time.monotonic() > until:
                    break
        tell(end=part, part=part, left=[])


def told(done: Sequence[record.Row]) -> str:
    """What rows say to the goals of their operators."""
    ops = [op for op in dict.fromkeys(row["op"] for row in done) if op in goals.GOALS]
    return "\n\n".join(f"Goals of {op}\n\n{goals.table(op, done)}" for op in ops)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timed", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="PART:SECONDS", help=f"of {', '.join(TIMED)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--latency", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="cases of the first part")
    parser.add_argument("--began", type=float, default=time.time(), help="when this process was started, since 1970")
    given = parser.parse_args(words)
    begin = time.monotonic() - (time.time() - given.began)
    torch.manual_seed(0)
    parts = Parts(given.device, given.kernels, given.latency)
    shares = dict(share.rsplit(":", 1) for share in given.parts)
    for number, (part, seconds) in enumerate(shares.items()):
        parts.follow(part, begin + float(seconds), given.skip if number == 0 else 0)
        begin = time.monotonic()
    return 0


if __name__ == "__main__":
    sys.exit(main())
