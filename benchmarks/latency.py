"""Latency of a base detector against smaller ones, by the protocol of `jdkd.latency`.

    python -m benchmarks.latency                                  R101-FPN at 800x1333 and students cut from it
    python -m benchmarks.latency --model retinanet_resnet50_fpn --size 400 667 --runtimes eager onnxruntime
    python -m benchmarks.latency --detectors runs/base runs/demo/student --images val/*.jpg --runtimes eager onnxruntime

The base and some students take turns, in one runtime and mode after the other (what is compiled or exported first runs
in both modes at once), and their rows are appended as soon as they are there, with all raw samples and with what the
base against itself gave. Without `--detectors` there is a ladder of students with random weights, see
`benchmarks.ladder`: what such networks find, and so what their NMS costs, is not what trained ones do, and every row
says so. Of a ladder nothing is measured again that the file holds: of the same sources, on the same machine, by the
same schedule. Without `--images` all look at noise. Sources that were changed since the last commit publish nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.ladder import RUNGS, Ladder, fresh
from benchmarks.record import Row
from jdkd.errors import InputError
from jdkd.export.runtimes import known_runtimes
from jdkd.latency import Grid, LatencyReport, Schedule, Work, fuse_for_inference, measure_grid, profile_cost
from jdkd.latency.cost import Cost
from jdkd.latency.grid import Score, with_facts
from jdkd.latency.protocol import conditions_of, cudnn_benchmark
from jdkd.latency.records import images_sha256, sources
from jdkd.latency.report import MODES
from jdkd.latency.runtimes import require_runnable

NOTES = {"random": "random weights: what NMS has to do is not what it has after training", "trained": ""}
GIVEN = ("runtime", "dtype", "batch_size", "mode")
AT_ONCE = "eager"  # the runtime that has a model ready without compiling or exporting it
FEW = 20  # rounds, below which warm-up is judged by one round and the next
Done = Callable[[Grid, str, str], bool]
"""Whether a student is measured: in a grid of one measurement, by the names of the base and its own."""


@dataclass(frozen=True)
class Turn:
    """What is timed together: the base and students, in turn, in one runtime, dtype and batch size.

    Args:
        base: its name.
        students: their names; none: the base alone.
        grid: of one measurement.
    """

    base: str
    students: tuple[str, ...]
    grid: Grid

    def __str__(self) -> str:
        (runtime,), (dtype,), (batch,) = self.grid.runtimes, self.grid.dtypes, self.grid.batch_sizes
        how = f"{runtime} {dtype}, batch {batch}, {' and '.join(self.grid.modes)}"
        return f"{how}: {', '.join(self.students or (self.base,))}"


def grid_of(*, rounds: int = 50, seconds: float = 20.0, warmup_seconds: float = 3.0, **grid: object) -> Grid:
    """What is measured, and for how long.

    Args:
        rounds, seconds: of a measurement, at least.
        warmup_seconds: at least so long before every measurement; at most three times as long.
        grid: runtimes, dtypes, batch sizes and processes of :class:`jdkd.latency.Grid`.
    """
    schedule = Schedule(rounds, seconds, 2 * seconds + 1, warmup_seconds, 3 * warmup_seconds)
    if rounds < FEW:
        schedule = replace(schedule, window=1, tolerance=0.03)
    return Grid(schedule=schedule, **grid)


def turns(models: Mapping[str, object], grid: Grid, together: int = 1, done: Done | None = None) -> list[Turn]:
    """What is left to time.

    Args:
        models: detectors by name, the base first.
        grid: what is asked for.
        together: students that take turns with the base at once.
        done: tells what is not left.

    Raises:
        InputError: no student takes a turn.
    """
    apart = [each if each.runtimes == (AT_ONCE,) else replace(each, modes=grid.modes) for each in grid.apart()]
    base, *students = models
    if together < 1:
        raise InputError(f"--together is {together}; at least 1 student takes turns with the base.")
    groups = [students[start : start + together] for start in range(0, len(students), together)]
    found = []
    for group in groups or [[base]]:
        for cell in dict.fromkeys(apart):
            left = [name for name in group if done is None or not done(cell, base, name)]
            found += [Turn(base, tuple(name for name in left if name != base), cell)] if left else []
    return found


class _Shipped(NamedTuple):
    """A detector as it is timed, and what it cost before."""

    model: nn.Module
    cost: Cost
    sha256: str

    @classmethod
    def of(cls, model: nn.Module, size: tuple[int, int], device: str) -> _Shipped:
        cost = profile_cost(model.to(device), size)
        return cls(fuse_for_inference(model), cost, record.weights_sha256(model))


def noise(size: tuple[int, int]) -> list[Tensor]:
    """One image ``[3, H, W]`` uint8, the same one every time."""
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]


def measured(
    models: Mapping[str, nn.Module],
    left: Sequence[Turn],
    size: tuple[int, int],
    device: str,
    weights: str,
    images: Sequence[Tensor] = (),
    score: Score | None = None,
) -> Iterator[list[Row]]:
    """Times what is left, one turn after the other; of the detectors only those of a turn are held.

    Args:
        models: detectors by name, the base first; one is taken when its turn comes.
        left: see :func:`turns`.
        size: height and width of the noise, in pixels, and of the image that arithmetic is counted of.
        device: ``cpu`` or ``cuda``.
        weights: ``random`` or ``trained``.
        images: ``[3, H, W]`` uint8; noise without any.
        score: mAP of a detector, in the form in which it was timed; None where it is not asked for.

    Yields:
        The rows of the base and of the students of one turn: samples in milliseconds, percentiles, ratios, cost,
        machine, protocol and commit.
    """
    said = {"weights": weights, "images": "image files" if images else "noise", "size": list(size)}
    said |= {"note": NOTES[weights], "device": record.device_name(device)}
    held: dict[str, _Shipped] = {}
    for turn in left:
        names = (turn.base, *turn.students)
        held = {name: held[name] for name in names if name in held}
        held |= {name: _Shipped.of(models[name], size, device) for name in names if name not in held}
        shipped = functools.partial(dict, {name: held[name].model for name in names})
        hashes = {name: {"weights_sha256": held[name].sha256} for name in names}
        costs = {name: held[name].cost for name in names}
        for report in measure_grid(Work(shipped, known_runtimes, images or noise(size), device, score), turn.grid):
            if report.models[turn.base].modes():  # an adopted detector may not have both
                yield rows(with_facts(report, hashes), costs, said)


def trained(folders: list[Path]) -> dict[str, nn.Module]:
    """Detectors from their folders, the base first."""
    from jdkd.detect import load

    return {str(folder): load(folder) for folder in folders}


def scoring(data: Path, models: Mapping[str, nn.Module], device: str) -> Score:
    """What scores detectors on the validation images of a folder in the COCO layout.

    Raises:
        InputError: one of the detectors cannot be scored on these.
    """
    from jdkd.cli.latency import dataset_of, map_on
    from jdkd.data import resolve_split
    from jdkd.train.evaluate import prepare

    score = functools.partial(map_on, resolve_split("val", data), device)
    for model in models.values():
        prepare(model, dataset_of(score.args[0]))
    return score


def kept_in(file: Path, size: tuple[int, int], device: str, images: Sequence[Tensor]) -> Done:
    """What a file of rows holds of ladders: of the same sources, on the same machine, by the same schedule.

    Args:
        file: which need not be there.
        size, device: see :func:`measured`.
        images: what is looked at.
    """
    held = record.load([file]) if file.is_file() and sources()["dirty"] is not True else []
    now, pixels = (_timed(record.commit()), record.sources_hash()), images_sha256(images)
    known = set()
    for row in held:
        how = row["protocol"]
        then = (_timed(row["commit"]), row["sources"])
        if then == now and how["sources"]["dirty"] is not True and how["images_sha256"] == pixels:
            cell = (row["mode"], row["runtime"], row["dtype"], row["batch_size"], max(1, len(row["processes"])))
            frozen = (_frozen(how["schedule"]), _frozen(row["environment"]))
            known.add((row["weights"], tuple(row["size"]), row["base"], row["model"], *cell, *frozen))

    @functools.cache
    def machine(runtime: str) -> frozenset:
        with cudnn_benchmark(torch.device(device)):
            return _frozen(conditions_of(torch.device(device), known_runtimes()[runtime]))

    def done(grid: Grid, base: str, name: str) -> bool:
        (runtime,), (dtype,), (batch,) = grid.runtimes, grid.dtypes, grid.batch_sizes
        rest = (runtime, dtype, batch, grid.processes, _frozen(vars(grid.schedule)), machine(runtime))
        return all(("random", size, base, name, mode, *rest) in known for mode in grid.modes)

    return done


@functools.cache
def _timed(commit: str | None) -> str | None:
    """What git calls the sources that a ladder's latencies depend on, at a commit; None where it does not know."""
    return record.command("git", "rev-parse", f"{commit}:jdkd", f"{commit}:benchmarks/ladder.py")


def _frozen(facts: Mapping[str, object]) -> frozenset:
    return frozenset(facts.items())


def rows(report: LatencyReport, costs: Mapping[str, Cost], said: Row) -> list[Row]:
    """One JSON-able row for every detector and mode.

    Args:
        report: the measurement.
        costs: of the detectors by name, before they were fused.
        said: what else all of them say: ``weights``, ``images`` and so on.
    """
    stored = report.to_json()
    protocol = report.protocol
    made = []
    for name, entry in stored["models"].items():
        made += [
            {
                "case": "latency",
                "model": name,
                "base": report.base,
                "mode": mode,
                "runtime": protocol["runtime"],
                "dtype": protocol["dtype"],
                "batch_size": protocol["batch_size"],
                **said,
                "params": costs[name].params,
                "gmacs": costs[name].gmacs,
                "macs_of_base": costs[name].gmacs / costs[report.base].gmacs,
                **entry[mode],
                "control": stored["control"][mode],
                "warnings": stored["warnings"],
                "facts": entry["facts"],
                "environment": report.environment,
                "protocol": protocol,
                "processes": stored["processes"],
                "commit": record.commit(),
                "sources": record.sources_hash(),
            }
            for mode in report.models[name].modes()
        ]
    return made


def line(row: Row) -> str:
    """A row as plain text."""
    figures = f"{row['p50']:8.2f} {row['p90']:8.2f} {row['p99']:8.2f} {row['iqr']:7.2f}"
    low, high = row["ratio_interval"]
    how = f"{row['runtime']} {row['mode']}"
    failed = "" if row["control"]["holds"] else "  A/A FAILS"
    ratio = f"{row['ratio']:.3f} ({low:.3f}–{high:.3f}) {row.get('verdict', '')}".rstrip()
    return f"{row['model']:40} {how:24} {figures}  {ratio}{failed}"


HEADING = f"{'model':40} {'runtime and mode':24} {'p50':>8} {'p90':>8} {'p99':>8} {'IQR':>7}  ratio (95 %)"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="faster_rcnn_r101_fpn", help="to cut: as jdkd train --model has it")
    parser.add_argument("--rungs", type=float, nargs="+", default=RUNGS, help="shares of its arithmetic to cut it to")
    parser.add_argument("--detectors", type=Path, nargs="+", help="folders of trained detectors, the base first")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files to look at, instead of noise")
    parser.add_argument("--data", type=Path, help="in the COCO layout, to score --detectors on its validation images")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"), help="of noise")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--runtimes", nargs="+", default=["eager"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--processes", type=int, default=1, help="fresh ones, over which the interval is given")
    parser.add_argument("--rounds", type=int, default=50, help="of a turn, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn, at least")
    parser.add_argument("--warmup-seconds", type=float, default=3.0, help="before a turn, at least; at most thrice")
    parser.add_argument("--together", type=int, help="students in a turn with the base; by default 1, of a ladder all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON-lines file; by default benchmarks/results/DEVICE/latency.jsonl")
    options = parser.parse_args(words)

    from jdkd.data import read_image

    if options.data is not None and not options.detectors:
        raise InputError("--data scores trained detectors, and a ladder has random weights; give --detectors.")
    weights = "trained" if options.detectors else "random"
    out = options.out or record.result_file(options.device, "latency")
    record.require_published(out)
    require_runnable(options.runtimes, known_runtimes(), torch.device(options.device), options.dtypes)
    images = [read_image(file) for file in options.images]
    size = tuple(images[0].shape[1:]) if images and options.detectors else tuple(options.size)
    amount = {name: getattr(options, name) for name in ("rounds", "seconds", "warmup_seconds", "processes")}
    grid = grid_of(**amount, **{f"{name}s": tuple(getattr(options, f"{name}s")) for name in GIVEN})
    if options.detectors:
        models, done, together = trained(options.detectors), None, 1
    else:
        base = fresh(options.model, size).to(options.device)
        models, together = Ladder(options.model, base, size, options.rungs), len(options.rungs)
        done = kept_in(out, size, options.device, images or noise(size))
    score = None if options.data is None else scoring(options.data, models, options.device)
    left = turns(models, grid, together if options.together is None else options.together, done)
    print(f"{weights} weights, rows in {out}\nleft to time, {len(left)}:")
    print("\n".join(f"  {turn}" for turn in left) + f"\n{HEADING}", flush=True)
    for made in measured(models, left, size, options.device, weights, images, score):
        record.append(out, made)
        print("\n".join(map(line, made)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{error}")
