"""What each ingredient of `jdkd.patch.accelerate` brings, alone, after those kept before it, and all together.

    python -m benchmarks.accelerate                              all models, on one thread
    python -m benchmarks.accelerate --models "FCOS R50" --rounds 5 --out /tmp/rows.jsonl

Weights are random, and the score threshold of every model is set so that it finds as much as it may: a network without
detections has no NMS to time and nothing to compare. The clock counts the processor time of the thread, so that other
work on the machine costs rounds and not truth. One row an ingredient is appended as soon as a model is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import markdown, record
from jdkd.errors import InputError
from jdkd.latency import Ratio, measure_quick
from jdkd.latency.clock import CpuClock
from jdkd.patch import accelerate
from jdkd.patch.plans import planned, structure_of

OP, ALL, CONTROL = "accelerate", "all that were kept", "nothing (A/A)"
HEADINGS = ("model", "ingredient", "over the plain model", "over what was kept before", "kept", "largest difference")
Row = dict[str, Any]
COMMITTED = 0.95
"""The share of torchvision's eager latency, on one thread of a CPU, that the interval of each R50 stays below."""


PROPOSALS = 300  # of two stages: torchvision's 1000 would be most of the time at such a size


def _torchvision(name: str, **own: Any) -> Callable[[int, int], nn.Module]:
    def make(short: int, long: int) -> nn.Module:
        from torchvision.models import detection

        return getattr(detection, name)(weights=None, weights_backbone=None, min_size=short, max_size=long, **own)

    return make


def _small(short: int, long: int) -> nn.Module:
    from jdkd.detect import detector

    return detector("gfl", "resnet18", 20, channels=64, min_size=short, max_size=long)


MODELS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, int]]] = {
    "Faster R-CNN R50": (_torchvision("fasterrcnn_resnet50_fpn", rpn_post_nms_top_n_test=PROPOSALS), (128, 192)),
    "RetinaNet R50": (_torchvision("retinanet_resnet50_fpn"), (128, 192)),
    "FCOS R50": (_torchvision("fcos_resnet50_fpn"), (128, 192)),
    "GFL R18, 64 channels": (_small, (128, 192)),
}
"""Who makes a model, and at which height and width it is timed."""


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model of :data:`MODELS` that finds something, and the image ``[3, H, W]`` that it finds it on."""
    build, size = MODELS[name]
    torch.manual_seed(0)
    model, image = build(*size).eval(), torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    heads = [module for module in model.modules() if isinstance(getattr(module, "score_thresh", None), float)]
    for head in heads:
        head.score_thresh = 0.0
    with torch.no_grad():
        lowest = float(model([image])[0]["scores"].min())
    for head in heads:
        head.score_thresh = lowest
    return model, image


def measured(name: str, model: nn.Module, image: Tensor, **timing: Any) -> list[Row]:
    """The rows of one model: every ingredient, all together, and the plain model against itself.

    What `accelerate` decides is timed pair by pair; the plain model, every ingredient alone, all that were kept and the
    plain model once more then take turns in one measurement.
    """
    images = [image]
    acceleration = accelerate(model, images, **timing)
    acceleration.restore()
    plan = planned(structure_of(model), images)
    tried = {trial.ingredient: (trial.ingredient,) for trial in acceleration.trials if trial.ratio is not None}
    variants = {"plain": structure_of(model)}
    for variant, ingredients in (tried | {ALL: acceleration.kept, CONTROL: ()}).items():
        variants[variant] = structure_of(model)
        plan.put(variants[variant], ingredients)
    report = measure_quick(variants, images, **timing)
    rows = [
        _row(name, trial.ingredient, report.ratio(trial.ingredient) if trial.ingredient in tried else None)
        | {"added": _json(trial.ratio), "kept": trial.kept, "reason": trial.reason}
        | {"difference": trial.difference and trial.difference.to_json()}
        for trial in acceleration.trials
    ]
    whole = acceleration.difference and acceleration.difference.to_json()
    rows.append(_row(name, ALL, report.ratio(ALL)) | {"kept": list(acceleration.kept), "difference": whole})
    rows.append(_row(name, CONTROL, report.ratio(CONTROL)) | {"ms": report.models["plain"].end_to_end.p50})
    common = {
        "size": list(image.shape[1:]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": record.device_name("cpu"),
        "torch": torch.__version__,
        "rounds": report.models["plain"].end_to_end.n // 2,
        "commit": record.commit(),
        "sources": record.sources_hash(),
    }
    return [row | common for row in rows]


def _row(case: str, ingredient: str, ratio: Ratio | None) -> Row:
    return {"op": OP, "case": case, "ingredient": ingredient, "alone": _json(ratio), "difference": None}


def _json(ratio: Ratio | None) -> list[float] | None:
    return None if ratio is None else [ratio.value, ratio.low, ratio.high]


def table(rows: Iterable[Row]) -> str:
    """Markdown: a table a device, a line a model and ingredient, the last measurement of each."""
    latest = {(row["device"], row["case"], row["ingredient"]): row for row in rows}
    parts = []
    for device in dict.fromkeys(device for device, _, _ in latest):
        own = [row for key, row in latest.items() if key[0] == device]
        parts.append(f"{device}:\n\n{markdown.table(HEADINGS, 'llrrl', map(_cells, own))}")
    return "\n\n".join(parts) or "Not measured."


def _cells(row: Row) -> list[str]:
    whole = row["ingredient"] == ALL
    kept = row.get("kept")
    if whole or row["ingredient"] == CONTROL:
        kept, bold = (", ".join(kept) or "none") if kept else "", "**" if whole else ""
    else:
        kept, bold = "yes" if kept else f"no: {row['reason']}", ""
    model = f"{row['case']} {row['size'][0]}x{row['size'][1]}"
    if "ms" in row:
        model += f", {row['ms']:.0f} ms"
    cells = [model, row["ingredient"], f"{bold}{_said(row['alone'])}{bold}", _said(row.get("added")), kept]
    return [*cells, _apart(row["difference"])]


def _said(ratio: Sequence[float] | None) -> str:
    return "–" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f}–{ratio[2]:.3f})"


def _apart(difference: Row | None) -> str:
    if difference is None:
        return "–"
    if difference["reason"]:
        return difference["reason"]
    boxes = f"{difference['box']:.1g} px, score {difference['score']:.1g} over {difference['detections']} detections"
    return f"stages {difference['stage']:.0e}, boxes {boxes}"


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=10, help="of each comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/DEVICE/accelerate.jsonl")
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    out = asked.out or record.result_file("cpu", OP)
    record.require_published(out)
    clock = CpuClock() if asked.threads == 1 else None
    for name in asked.models:
        rows = measured(name, *made(name), rounds=asked.rounds, max_seconds=120.0, clock=clock)
        record.append(out, rows)
        for row in rows:
            print(*_cells(row), sep=" | ", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"{error}")
