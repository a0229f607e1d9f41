"""Which channels a cut should take: criteria compared at one measured latency, on trained bases, in one cut.

python -m benchmarks.criteria runs/base-0 --data DIR   appends rows to results/DEVICE/criteria.jsonl, on one thread
python -m benchmarks.criteria                          print the table of the rows that are kept

For each aim the base is cut by every criterion, with batch norms recalibrated, without and with the least-squares
repair of what reads cut channels, scored, trained for ``--steps`` (0: not at all), and scored again. ``slimming`` is
network slimming (Liu et al., ICCV 2017): one share of all inner channels by their gamma, and the same share of each
other group by magnitude; the others cut by importance for each millisecond, and of blocks only those criteria know the
importance that are learnt from batches. Latencies are processor time of the thread, as other programs may run beside; a
second cut brings the measured ones together. What is learnt from batches is learnt from losses as they are, and once
more from each over its own size, as a search does it where the base knows its images by heart. A criterion whose cuts
do not reach an aim is left out.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import markdown, record
from jdkd.data import CocoDetectionDataset, batches, resolve_split
from jdkd.detect import load, read
from jdkd.distill import correlations, pyramids
from jdkd.errors import InputError
from jdkd.graph import ChannelGroup, Topology
from jdkd.latency import LatencyTable, fuse_for_inference, measure_quick, measure_table
from jdkd.latency.clock import CpuClock
from jdkd.morph import Morph, channel_importance, cut_to, repair
from jdkd.morph.cutting import FLOOR
from jdkd.morph.importance import LEARNT, READ_OFF, gamma_importance, magnitude_importance
from jdkd.rewrite import Rewrite
from jdkd.train import TrainConfig, calibrate_bn, evaluate, fit

SLIMMING = "slimming"
BATCHES, BATCH = 3, 8  # that repair and calibration see, and images in each
WEIGHING = 16  # batches that importance is learnt from
UNREPAIRED = "taylor"  # the criterion whose cuts are trained without repair too
LOSSES = {True: "each over itself", False: "as they are", None: ""}
OP = "criteria"
HEADINGS = (
    *("base", "its mAP", "criterion", "losses", "repaired"),
    *("latency ratio", "kept r", "mAP", "after {} steps"),
)
Row = record.Row
Key = tuple[str, bool | None]  # a criterion, and whether losses are relative, where it is learnt from some


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base", type=Path, nargs="?", help="folder of a trained detector")
    options.add_argument("--data", type=Path, help="COCO-format folder that it was trained on")
    options.add_argument("--aims", type=float, nargs="+", default=[0.53])
    options.add_argument("--images", type=int, default=100, help="validation images that score")
    options.add_argument("--steps", type=int, default=100, help="of training after the cut")
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    if given.base is not None:
        torch.set_num_threads(1)
        for row in _rows(given):
            record.append(record.result_file("cpu", OP), [row])
            print(*_cells(row), sep=" | ", flush=True)
    print(table(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))


def _rows(given: argparse.Namespace) -> Iterator[Row]:
    """A row for each aim, criterion and repair."""
    train, val = (CocoDetectionDataset(resolve_split(name, given.data, None, None, False)) for name in ("train", "val"))
    val = val.subset(range(min(given.images, len(val))))
    base = load(given.base)
    topology = read(base)
    images = [val[index][0] for index in range(4)]
    costs = measure_table(base, topology, images, clock=CpuClock())
    probe = list(batches(train, batch_size=BATCH, steps=BATCHES, seed=given.seed))
    unseen = list(batches(val, batch_size=BATCH, steps=2, seed=given.seed))
    weighing = list(batches(train, batch_size=BATCH, steps=WEIGHING, seed=given.seed))
    importance: dict[Key, Mapping[str, Tensor]] = {(c, None): channel_importance(base, topology, c) for c in READ_OFF}
    for relative, name in itertools.product((True, False), LEARNT):
        importance[name, relative] = channel_importance(base, topology, name, weighing, relative=relative)
    seen = pyramids(base, unseen)
    common = {
        "op": OP,
        "base": "/".join(given.base.parts[-2:]),
        "base_map": evaluate(fuse_for_inference(base), val, device="cpu").map,
        "images": len(val),
        "seed": given.seed,
        "steps": given.steps,
        "lr": given.lr,
    }
    common |= {name: value for name, value in record.environment("cpu", 0).items() if name != "copy_bytes_per_s"}
    for aim in given.aims:
        morphs, ratios = _cuts(base, topology, costs, aim, importance, images)
        for (name, relative), morph in morphs.items():
            for repaired in (False, True):
                child = morph.apply(base, topology)
                if repaired:
                    repair(child, base, morph.rewrite, topology, probe)
                calibrate_bn(child, probe)
                channels = [morph.rewrite.surviving(level) for level in topology.followed]
                distances = correlations(child, seen, unseen, channels=channels).values()
                yield {
                    **common,
                    "aim": aim,
                    "criterion": name,
                    "relative": relative,
                    "repaired": repaired,
                    "predicted": costs.predict(base, topology, morph.rewrite),
                    "ratio": ratios[name, relative],
                    "kept_r": 1 - sum(distances) / len(distances),
                    "map": evaluate(fuse_for_inference(child), val, device="cpu").map,
                    "map_trained": _trained(child, train, val, given) if repaired or name == UNREPAIRED else None,
                    "action": morph.action,
                }


def _cuts(
    base: nn.Module,
    topology: Topology,
    costs: LatencyTable,
    aim: float,
    importance: Mapping[Key, Mapping[str, Tensor]],
    images: Sequence[Tensor],
) -> tuple[dict[Key, Morph], dict[Key, float]]:
    """What each criterion cuts for one aim, and the ratios that were measured, brought together by a second try."""
    slimming: Key = (SLIMMING, None)
    aims = dict.fromkeys([slimming, *importance], aim)
    for _ in range(2):
        morphs = {slimming: _slimming(base, topology, costs, aims[slimming])}
        for key in [key for key in importance if key in aims]:
            try:
                morphs[key] = cut_to(base, topology, costs, aims[key], importance[key])
            except InputError as error:  # whoever weighs no block may take channels alone
                print(f"{key[0]} cannot: {error}", flush=True)
        cut = {f"{name} {LOSSES[relative]}": morph.apply(base, topology) for (name, relative), morph in morphs.items()}
        deployed = {name: fuse_for_inference(model) for name, model in {"base": base, **cut}.items()}
        measured = measure_quick(deployed, images, clock=CpuClock())
        ratios = {key: measured.ratio(name).value for key, name in zip(morphs, cut, strict=True)}
        aims = {key: aims[key] * aim / ratio for key, ratio in ratios.items()}
    return morphs, ratios


def _slimming(base: nn.Module, topology: Topology, costs: LatencyTable, aim: float) -> Morph:
    """The least share of all channels whose cut is predicted to reach an aim."""
    low, high = 0.0, 0.95
    for _ in range(12):
        share = (low + high) / 2
        reached = costs.predict(base, topology, _slimmed(base, topology, share).rewrite) <= aim
        low, high = (low, share) if reached else (share, high)
    return _slimmed(base, topology, high)


def _slimmed(base: nn.Module, topology: Topology, share: float) -> Morph:
    """A cut of one share: of all inner channels that pass a norm together, and of each other group by itself."""
    inner = {g.name: gamma_importance(base, topology, g) for g in topology.inner if topology.norms(g)}
    channels = [values.repeat_interleave(_unit(topology[name])) for name, values in inner.items()]
    every = torch.cat(channels) if channels else torch.zeros(1)
    threshold = every.kthvalue(max(1, round(share * len(every)))).values
    keep = {}
    for group in topology.groups:
        values = inner.get(group.name)
        left = 1 - share if values is None else float((values > threshold).sum()) / group.units
        if (count := group.shrunk(max(left, FLOOR))) < group.units:
            values = magnitude_importance(base, group) if values is None else values
            keep[group.name] = values.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return Morph(f"slim by {share:.0%}", Rewrite(keep=keep))


def _unit(group: ChannelGroup) -> int:
    return group.size // group.units


def _trained(child: nn.Module, train: Any, val: Any, given: argparse.Namespace) -> float | None:
    """mAP after a short training; None where ``--steps`` is 0."""
    if not given.steps:
        return None
    flip = 0.5 if train.mirror_symmetric else 0.0
    config = TrainConfig(steps=given.steps, lr=given.lr, seed=given.seed, flip=flip, batch_size=BATCH)
    fit(child, train, config, device="cpu")
    return evaluate(fuse_for_inference(child), val, device="cpu").map


def _cells(row: Row) -> list[str]:
    trained = "" if row["map_trained"] is None else f"{row['map_trained']:.3f}"
    which = row["criterion"], LOSSES[row["relative"]], "yes" if row["repaired"] else "no"
    cells = [row["base"], f"{row['base_map']:.3f}", *which]
    return [*cells, *(f"{row[name]:.3f}" for name in ("ratio", "kept_r", "map")), trained]


def table(rows: Sequence[Row]) -> str:
    """Markdown tables, one for each aim and number of steps: the latest row of each base, criterion and repair."""
    key = "aim", "steps", "base", "criterion", "relative", "repaired"
    latest = {tuple(row[name] for name in key): row for row in rows}
    parts = []
    for aim, steps in dict.fromkeys(key[:2] for key in latest):
        own = (_cells(row) for key, row in latest.items() if key[:2] == (aim, steps))
        parts.append(markdown.table([heading.format(steps) for heading in HEADINGS], "lrlllr", own))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
