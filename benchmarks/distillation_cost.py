"""What a step of `jdkd distill` costs, against the same loop with the loss as its authors write it.

python -m benchmarks.distillation_cost          measure and print, in less than two minutes of one core
python -m benchmarks.distillation_cost --save   also append the rows to benchmarks/results/<device>/
python -m benchmarks.distillation_cost --page   only print the table of the rows that are kept

Two cases: a whole training step of a small detector under another, and the loss and its gradients alone at COCO's level
sizes. Variants take turns in one process, and a ratio is of two that ran one after the other. Memory is the most that
was resident beyond what was before the first step, each variant in a process of its own, which begins with nothing
but the models and the batch; optimizer states and gradients count for all alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness, markdown, record
from benchmarks.cases import pearson
from jdkd.detect import detector
from jdkd.distill import DistillConfig, comparable
from jdkd.functional import pearson_tap
from jdkd.reference.pearson import pkd_loss
from jdkd.train import TrainConfig
from jdkd.train.optimizer import build_optimizer

OP = "distillation_cost"
EAGER, OURS, ALONE = "eager", "jdkd", "no teacher"
ROUNDS, WARM_UP, WEIGHED = 15, 2, 3  # timed, not timed, and steps whose memory is taken
SIZE, BATCH, CHANNELS = (96, 128), 4, 64  # pixels, images, of the pyramid
WEIGHT = 10.0
HEADINGS = ("case", "variant", "a step (quartiles)", "of eager's time (quartiles)", "peak memory")

Run = Callable[[], float]
"""Takes a step and returns the loss."""


class EagerTap:
    """The loss by plain operations, in place of :class:`jdkd.nn.PearsonTap`; the heads keep the neck's levels.

    Args:
        loss_weight: weight of each level.
    """

    def __init__(self, loss_weight: float) -> None:
        self.loss_weight = loss_weight

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        losses = [pkd_loss([ours], [theirs], self.loss_weight) for ours, theirs in zip(students, teachers, strict=True)]
        return students, sum(losses), torch.stack(losses).detach()


@contextmanager
def training_step(variant: str, size: tuple[int, int] = SIZE, channels: int = CHANNELS) -> Iterator[Run]:
    """The step of a small FCOS under another of its kind, as :func:`jdkd.train.fit` takes it, for a batch of noise.

    Args:
        variant: whose loss: :data:`EAGER`, :data:`OURS`, or none.
        size: short and long side of the images, in pixels.
        channels: of both pyramids.
    """
    torch.manual_seed(0)
    how = {"channels": channels, "min_size": size[0], "max_size": size[1], "norm": "batch"}
    student, teacher = (detector("fcos", "resnet18", ("one", "two"), **how) for _ in range(2))
    images = [torch.rand(3, *size) for _ in range(BATCH)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]), "labels": torch.tensor([1])} for _ in images]
    optimizer = build_optimizer(student, config := TrainConfig(steps=1))

    def step(more: Callable[[], dict[str, Tensor]]) -> float:
        optimizer.zero_grad(set_to_none=True)
        terms = student(images, targets) | more()
        total = torch.stack([*terms.values()]).sum()
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        optimizer.step()
        return float(total.detach())

    distiller, _ = comparable(student, teacher, (images, targets), DistillConfig(loss_weight=WEIGHT))
    if variant == ALONE:  # which has run both as well, so that its memory begins where the others' does
        yield partial(step, dict)
        return
    if variant == EAGER:
        distiller.terms["loss_pkd"].tap = EagerTap(WEIGHT)
    with distiller:
        yield partial(step, distiller.losses)


@contextmanager
def loss_step(variant: str, levels: Sequence[str] = pearson.PYRAMIDS["P3-P7"], images: int = 2) -> Iterator[Run]:
    """The loss and the gradients of the student's levels, the heads' included, at the sizes of an 800x1333 image.

    Args:
        variant: :data:`EAGER` or :data:`OURS`.
        levels: names of them.
        images: the batch.
    """
    torch.manual_seed(0)
    shapes = [(images, pearson.CHANNELS, *pearson.SIZES[level]) for level in levels]
    given = pearson.inputs(shapes, torch.float32, "NCHW", "tap", "cpu", 1.0)
    provider = pearson.step(pkd_loss) if variant == EAGER else pearson.step(pearson_tap, tapped=True)
    yield lambda: float(provider(given)[0])


CASES = {
    f"training step, FCOS R18, {CHANNELS} channels, {SIZE[0]}x{SIZE[1]}, batch {BATCH}": (
        training_step,
        (EAGER, OURS, ALONE),
    ),
    f"loss alone, P3-P7 of 800x1333, {pearson.CHANNELS} channels, batch 2": (loss_step, (EAGER, OURS)),
}


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; they take turns, and who begins does too."""
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = [*runs] if number % 2 == 0 else [*reversed(runs)]
        for name in names:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak(case: str, variant: str) -> int:
    """Bytes that a few steps of a variant keep resident at most, in a process of its own; see the module."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (case, variant))


def _peak_here(case: str, variant: str) -> int:
    torch.set_num_threads(1)
    with CASES[case][0](variant) as run:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew, below what imports took
        before = _resident("VmRSS")
        for _ in range(WEIGHED):
            run()
        return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """What the kernel says of this process, in bytes."""
    return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def rows(case: str, seconds: dict[str, list[float]], peaks: dict[str, int], common: record.Row) -> list[record.Row]:
    """A row for each variant, the eager one first.

    Args:
        case: its name.
        seconds: of each variant, round by round.
        peaks: bytes, by variant.
        common: see :func:`benchmarks.record.environment`.
    """
    made = []
    for variant, own in seconds.items():
        ratio = np.array(own) / np.array(seconds[EAGER])  # [rounds]
        spread = {"seconds": np.quantile(own, (0.25, 0.75)), "ratio": np.quantile(ratio, (0.25, 0.75))}
        made.append(
            {
                "op": OP,
                "case": case,
                "variant": variant,
                "seconds": round(float(np.median(own)), 6),
                "seconds_quartiles": spread["seconds"].round(6).tolist(),
                "ratio": round(float(np.median(ratio)), 4),
                "ratio_quartiles": spread["ratio"].round(4).tolist(),
                "rounds": len(own),
                "peak_bytes": peaks[variant],
                **common,
            }
        )
    return made


def page(kept: Sequence[record.Row]) -> str:
    """A Markdown table: the latest of each device, case and variant."""
    latest = {(row["device"], row["case"], row["variant"]): row for row in kept}
    parts = []
    for device in dict.fromkeys(row["device"] for row in latest.values()):
        own = (_cells(row) for row in latest.values() if row["device"] == device)
        parts.append(f"{device}:\n\n{markdown.table(HEADINGS, 'llr', own)}")
    return "\n\n".join(parts)


def _cells(row: record.Row) -> list[str]:
    low, high = (record.duration(each * 1e6) for each in row["seconds_quartiles"])
    ratio = "1"
    if row["variant"] != EAGER:
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["ratio_quartiles"])
    step = f"{record.duration(row['seconds'] * 1e6)} ({low} to {high})"
    return [row["case"], row["variant"], step, ratio, f"{row['peak_bytes'] / 1e6:.0f} MB"]


def measured(case: str, common: record.Row, rounds: int = ROUNDS) -> list[record.Row]:
    """The rows of one case."""
    make, variants = CASES[case]
    with ExitStack() as stack:
        seconds = timed({variant: stack.enter_context(make(variant)) for variant in variants}, rounds)
    return rows(case, seconds, {variant: peak(case, variant) for variant in variants}, common)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args(arguments)
    if asked.page:
        print(page(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))
        return
    torch.set_num_threads(1)
    common: dict[str, Any] = record.environment("cpu", harness.copy_bandwidth("cpu"))
    made = [row for case in CASES for row in measured(case, common, asked.rounds)]
    if asked.save:
        record.append(record.result_file("cpu", OP), made)
    print(page(made))


if __name__ == "__main__":
    main(sys.argv[1:])
