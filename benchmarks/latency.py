"""Latency of a base detector against narrower ones, by the protocol of `jdkd.latency`.

    python -m benchmarks.latency                                  R50-FPN and students at 800x1344
    python -m benchmarks.latency --size 320 320 --seconds 20      something a CPU can do
    python -m benchmarks.latency --detectors runs/base runs/demo/student --size 128 128

The base and one student take turns at a time, in one mode after the other, and the two rows of each are appended as
soon as they are there, with all raw samples. Without `--detectors` the weights are random: such a network finds next to
nothing, so its NMS is cheaper than that of a trained one, and every row says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import record
from benchmarks.record import Row
from jdkd.latency import LatencyReport, fuse_for_inference, measure, profile_cost
from jdkd.latency.cost import Cost
from jdkd.latency.protocol import MODES

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
    batch_size: int = 1,
    warmup_seconds: float = 3.0,
) -> Iterator[list[Row]]:
    """Times the base and each student in turn, in one mode after the other.

    Args:
        models: detectors by name, the base first.
        size: height and width of the noise images, in pixels.
        device: ``cpu`` or ``cuda``.
        weights: ``random`` or ``trained``.
        rounds, seconds: of a mode of a pair, at least.
        batch_size: images a call.
        warmup_seconds: at least so long before every mode of a pair; at most three times as long.

    Yields:
        The rows of the base and of one student in one mode: samples in milliseconds, percentiles, ratios, cost,
        machine, protocol and commit.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(IMAGES)]
    shipped = {name: fuse_for_inference(model) for name, model in models.items()}
    costs = {name: profile_cost(model.to(device), size) for name, model in models.items()}
    base, *students = shipped
    for name in students or [base]:
        for mode in MODES:
            report = measure(
                {key: shipped[key] for key in dict.fromkeys((base, name))}, images,
                device=device, rounds=rounds, min_seconds=seconds, max_seconds=2 * seconds + 1, batch_size=batch_size,
                warmup_seconds=warmup_seconds, warmup_limit=3 * warmup_seconds, modes=(mode,),
            )  # fmt: skip
            if report.models[base].modes():  # the backbone is replayed on a GPU alone
                yield rows(report, costs, weights)


def rows(report: LatencyReport, costs: Mapping[str, Cost], weights: str) -> list[Row]:
    """One JSON-able row for every detector and mode.

    Args:
        report: the measurement.
        costs: of the detectors by name, before they were fused.
        weights: ``random`` or ``trained``.
    """
    stored = report.to_json()
    made = []
    for name, entry in stored["models"].items():
        made += [
            {
                "case": "latency",
                "model": name,
                "base": report.base,
                "mode": mode,
                "weights": weights,
                "params": costs[name].params,
                "gmacs": costs[name].gmacs,
                **entry[mode],
                "facts": entry["facts"],
                "environment": report.environment,
                "protocol": report.protocol,
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
    return f"{row['model']:40} {row['mode']:16} {figures}  {row['ratio']:.3f} ({low:.3f}–{high:.3f})"


HEADING = f"{'model':40} {'mode':16} {'p50':>8} {'p90':>8} {'p99':>8} {'IQR':>7}  ratio (95 %)"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="faster_rcnn_r50_fpn")
    parser.add_argument("--detectors", type=Path, nargs="+", help="folders of trained detectors, the base first")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50, help="of a pair in a mode, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a pair in a mode, at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON-lines file; by default benchmarks/results/DEVICE/latency.jsonl")
    options = parser.parse_args(words)

    size, weights = tuple(options.size), "trained" if options.detectors else "random"
    models = trained(options.detectors) if options.detectors else ladder(options.spec, size)
    out = options.out or record.result_file(options.device, "latency")
    print(f"{weights} weights, noise images, batch {options.batch_size}, rows in {out}\n{HEADING}", flush=True)
    amount = {"rounds": options.rounds, "seconds": options.seconds, "batch_size": options.batch_size}
    for made in measured(models, size, options.device, weights, **amount):
        record.append(out, made)
        print("\n".join(map(line, made)), flush=True)


if __name__ == "__main__":
    main()
