"""Latency of a base detector against narrower ones, by the protocol of `jdkd.latency`.

    python -m benchmarks.latency                                  R50-FPN and students at 800x1344
    python -m benchmarks.latency --size 320 320 --seconds 20      something a CPU can do
    python -m benchmarks.latency --detectors runs/base runs/demo/student --images val/*.jpg --runtimes eager onnxruntime

The base and one student take turns at a time, in one mode and runtime after the other, and the two rows of each are
appended as soon as they are there, with all raw samples and with what the base against itself gave. Without
`--detectors` the weights are random: such a network finds next to nothing, so its NMS is cheaper than that of a trained
one, and every row says so; without `--images` it looks at noise. Sources that were changed since the last commit
publish nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.record import Row
from jdkd.errors import InputError
from jdkd.export.runtimes import known_runtimes
from jdkd.latency import Grid, LatencyReport, Schedule, Work, fuse_for_inference, measure_grid, profile_cost
from jdkd.latency.cost import Cost
from jdkd.latency.grid import with_facts
from jdkd.latency.records import require_published, weights_sha256
from jdkd.latency.report import MODES

LADDER = ((1.0, 1.0), (0.75, 1.0), (0.5, 1.0), (0.5, 0.5))  # width and depth, both over the base's
IMAGES = 4


def ladder(name: str, size: tuple[int, int], rungs: Sequence[tuple[float, float]] = LADDER) -> dict[str, nn.Module]:
    """A named spec and narrower, shallower ones, with random weights.

    Args:
        name: of the spec.
        size: height and width of the input, in pixels.
        rungs: width and depth of each, over the published ones, the base's first.

    Returns:
        Detectors by what they are, the base first.
    """
    from jdkd.detect import build, named_spec

    torch.manual_seed(0)
    models = {}
    for width, depth in rungs:
        classes = [f"class {number}" for number in range(80)]
        spec = named_spec(name, classes, width=width, depth=depth, min_size=min(size), max_size=max(size))
        models[f"{name} width {width:g} depth {depth:g}"] = build(spec)
    return models


def trained(folders: list[Path]) -> dict[str, nn.Module]:
    """Detectors from their folders, the base first."""
    from jdkd.detect import load

    return {str(folder): load(folder) for folder in folders}


def measured(
    models: Mapping[str, nn.Module],
    size: tuple[int, int],
    device: str,
    weights: str,
    *,
    rounds: int = 50,
    seconds: float = 20.0,
    warmup_seconds: float = 3.0,
    images: Sequence[Tensor] = (),
    **grid: object,
) -> Iterator[list[Row]]:
    """Times the base and each student in turn, in one mode, runtime, dtype and batch size after the other.

    Args:
        models: detectors by name, the base first.
        size: height and width of the noise images, in pixels, and of the image that arithmetic is counted of.
        device: ``cpu`` or ``cuda``.
        weights: ``random`` or ``trained``.
        rounds, seconds: of a measurement, at least.
        warmup_seconds: at least so long before every measurement; at most three times as long.
        images: ``[3, H, W]`` uint8; noise without any.
        grid: runtimes, dtypes, batch sizes and processes of :class:`jdkd.latency.Grid`.

    Yields:
        The rows of the base and of one student: samples in milliseconds, percentiles, ratios, cost, machine, protocol
        and commit.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(IMAGES)]
    shipped = {name: fuse_for_inference(model) for name, model in models.items()}
    costs = {name: profile_cost(model.to(device), size) for name, model in models.items()}
    hashes = {name: {"weights_sha256": weights_sha256(model)} for name, model in models.items()}
    schedule = Schedule(rounds, seconds, 2 * seconds + 1, warmup_seconds, 3 * warmup_seconds)
    origin = "photographs" if images else "noise"
    base, *students = shipped
    for name in students or [base]:
        pair = functools.partial(dict, {key: shipped[key] for key in dict.fromkeys((base, name))})
        for cell in Grid(modes=MODES, schedule=schedule, **grid).apart():
            for report in measure_grid(Work(pair, known_runtimes, images or noise, device), cell):
                if report.models[base].modes():  # an adopted detector may not have both
                    yield rows(with_facts(report, hashes), costs, weights, origin)


def rows(report: LatencyReport, costs: Mapping[str, Cost], weights: str, origin: str) -> list[Row]:
    """One JSON-able row for every detector and mode.

    Args:
        report: the measurement.
        costs: of the detectors by name, before they were fused.
        weights: ``random`` or ``trained``.
        origin: ``noise`` or ``photographs``.
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
                "weights": weights,
                "images": origin,
                "params": costs[name].params,
                "gmacs": costs[name].gmacs,
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
    parser.add_argument("--spec", default="faster_rcnn_r50_fpn")
    parser.add_argument("--detectors", type=Path, nargs="+", help="folders of trained detectors, the base first")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files to look at, instead of noise")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--runtimes", nargs="+", default=["eager"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--processes", type=int, default=1, help="fresh ones, over which the interval is given")
    parser.add_argument("--rounds", type=int, default=50, help="of a pair in a mode, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a pair in a mode, at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON-lines file; by default benchmarks/results/DEVICE/latency.jsonl")
    options = parser.parse_args(words)

    from jdkd.data import read_image

    size, weights = tuple(options.size), "trained" if options.detectors else "random"
    out = options.out or record.result_file(options.device, "latency")
    require_published(out)
    models = trained(options.detectors) if options.detectors else ladder(options.spec, size)
    print(f"{weights} weights, rows in {out}\n{HEADING}", flush=True)
    amount = {"rounds": options.rounds, "seconds": options.seconds, "processes": options.processes}
    grid = {name: tuple(getattr(options, name)) for name in ("batch_sizes", "runtimes", "dtypes")}
    images = [read_image(file) for file in options.images]
    for made in measured(models, size, options.device, weights, images=images, **amount, **grid):
        record.append(out, made)
        print("\n".join(map(line, made)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{error}")
