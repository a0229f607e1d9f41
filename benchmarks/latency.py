"""Latency of a base detector against a ladder of narrower ones, by the protocol of `jdkd.latency`.

    python -m benchmarks.latency                                  R50-FPN and students at 800x1344
    python -m benchmarks.latency --size 320 320 --seconds 20      something a CPU can do
    python -m benchmarks.latency --detectors runs/base runs/demo/student --size 128 128

Without `--detectors` the weights are random: such a network finds next to nothing, so its NMS is cheaper than
that of a trained one, and every row says so. Rows are appended as JSON lines with all raw samples.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jdkd.latency import LatencyReport, count, deployable, measure

ROOT = Path(__file__).resolve().parents[1]
LADDER = ((1.0, 1.0), (0.75, 1.0), (0.5, 1.0), (0.5, 0.5))  # width and depth, both over the base's


def ladder(name: str, size: tuple[int, int]) -> dict[str, nn.Module]:
    """A named spec and narrower, shallower ones, with random weights.

    Args:
        name: of the spec.
        size: height and width of the input.

    Returns:
        Detectors by what they are, the base first.
    """
    from jdkd.detect import build, named_spec

    torch.manual_seed(0)
    models = {}
    for width, depth in LADDER:
        classes = [f"class {number}" for number in range(80)]
        spec = named_spec(name, classes, width=width, depth=depth, min_size=min(size), max_size=max(size))
        models[f"{name} width {width:g} depth {depth:g}"] = build(spec)
    return models


def trained(folders: list[Path]) -> dict[str, nn.Module]:
    """Detectors from their folders, the base first."""
    from jdkd.detect import load

    return {str(folder): load(folder) for folder in folders}


def rows(report: LatencyReport, models: dict[str, nn.Module], weights: str) -> list[dict[str, Any]]:
    """One JSON-able row for every detector.

    Args:
        report: the measurement.
        models: what was measured.
        weights: `random` or `trained`.

    Returns:
        Rows with samples, percentiles, ratios, cost, machine, protocol and commit.
    """
    stored = report.to_json()
    size = tuple(map(int, report.protocol["image_sizes"][0].split("x")))
    made = []
    for name, entry in stored["models"].items():
        cost = count(models[name], size)
        made.append(
            {
                "case": "latency",
                "model": name,
                "base": report.base,
                "weights": weights,
                "params": cost.params,
                "gmacs": cost.gmacs,
                **entry,
                "environment": report.environment,
                "protocol": report.protocol,
                "commit": _commit(),
            }
        )
    return made


def table(made: list[dict[str, Any]]) -> str:
    """The rows as plain text, one line for each detector and mode."""
    lines = [f"{'model':40} {'mode':16} {'p50':>8} {'p90':>8} {'p99':>8} {'IQR':>7}  ratio (95 %)"]
    for row in made:
        for mode in ("end_to_end", "model_only", "backbone_replay"):
            if mode in row:
                found = row[mode]
                figures = f"{found['p50']:8.2f} {found['p90']:8.2f} {found['p99']:8.2f} {found['iqr']:7.2f}"
                low, high = found["ratio_interval"]
                lines.append(f"{row['model']:40} {mode:16} {figures}  {found['ratio']:.3f} ({low:.3f}–{high:.3f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="faster_rcnn_r50_fpn")
    parser.add_argument("--detectors", type=Path, nargs="+", help="folders of trained detectors, the base first")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON-lines file; by default benchmarks/results/DEVICE/latency.jsonl")
    options = parser.parse_args()

    size = tuple(options.size)
    models = trained(options.detectors) if options.detectors else ladder(options.spec, size)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(4)]
    report = measure(
        {name: deployable(model) for name, model in models.items()},
        images,
        device=options.device,
        rounds=options.rounds,
        min_seconds=options.seconds,
        batch_size=options.batch_size,
    )
    made = rows(report, models, "trained" if options.detectors else "random")
    device = re.sub(r"\W+", "-", report.environment["device_name"]).strip("-").lower()
    out = options.out or ROOT / "benchmarks" / "results" / device / "latency.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in made)
    print(table(made))
    weights, machine = made[0]["weights"], report.environment["device_name"]
    print(f"{weights} weights, noise images, batch {options.batch_size}, {machine}")
    print(out)


def _commit() -> str | None:
    """The commit that this checkout is at, if git knows."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
