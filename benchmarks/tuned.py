"""What `jdkd tune` found on this machine, and whether any shape of the benchmark cases is slower for it.

    jdkd tune && python -m benchmarks.tuned          times, and prints a page
    python -m benchmarks.tuned --save                also appends to benchmarks/results/<device>/tuned.jsonl
    python -m benchmarks.tuned --device cuda         of a GPU

A row for every region that was timed: the way that is taken, the default, and the ratios of their times. And a row for
every shape of the cases of the Pearson loss (every level of a pyramid, and for its forms whole pyramids too, 256
channels, one image of 800x1344) and of the elastic convolutions (all 1x1 and 3x3 ones of a ResNet-50 with its pyramid,
at half width), in every dtype: the shapes for which another way than the default is taken are timed again, the default
and that way in turns, by what `jdkd tune` times with. Where the default is taken nothing can have changed, and nothing
is timed: a row counts these shapes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import conv_shapes, record
from benchmarks.cases import pearson as pearson_cases
from jdkd import _tuned
from jdkd.env import load_operators
from jdkd.tune import convolutions, pearson
from jdkd.tune.session import compared
from jdkd.tune.shapes import DTYPES, LAYOUTS, Shape
from jdkd.tune.timing import clock_of

WIDTH = 0.5
SECONDS = 1.0  # for a shape


def shapes(device: torch.device) -> Iterator[tuple[str, Shape]]:
    """The shapes of the benchmark cases, with labels that say where they occur."""
    for dtype in DTYPES[device.type]:
        yield from _shapes_in(device, dtype)


def _shapes_in(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Shape]]:
    levels = {name: (1, pearson_cases.CHANNELS, *size) for name, size in pearson_cases.SIZES.items()}
    for name, layout in itertools.product(levels, LAYOUTS):
        for form in ("loss", "gradient", "tap"):
            yield f"{name} {form}", pearson.of_backends(device, dtype, layout, [levels[name]], form)
    for name, parts in {**{name: (name,) for name in levels}, **pearson_cases.PYRAMIDS}.items():
        yield f"{name} loss with gradient", pearson.of_forms(device, dtype, [levels[part] for part in parts])
    for (label, conv), layout, both in itertools.product(conv_shapes.distinct().items(), LAYOUTS, (True, False)):
        filters = convolutions.Filters(conv.kernel, conv.stride)
        if filters in convolutions.LEADING and conv.padding == conv.kernel // 2:
            given = device, dtype, layout, filters, conv.size, conv.active(WIDTH), both
            yield label, convolutions.of_kernels(*given)


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """What was found, and what came of the shapes."""
    for table, regions in _tuned.regions(device).items():
        for name, region in regions.items():
            yield {"table": table, "region": name, **region._asdict(), "measured": [*map(tuple, region.measured)]}
    clock, as_before = clock_of(device), Counter()
    for label, shape in shapes(device):
        row = {"table": shape.table.name, "case": label, "shape": shape.label, "region": shape.table.region(shape.call)}
        if (path := shape.table.tuned(shape.call)) is None:
            as_before[shape.table.name] += 1
            continue
        default = _tuned.regions(device)[shape.table.name][row["region"]].default
        ratio = compared(shape, default, [path], SECONDS, clock)[path]
        yield {**row, "path": path, "default": default, "ratio": [ratio.value, ratio.low, ratio.high]}
    for table, count in as_before.items():
        yield {"table": table, "shapes": count, "path": "the default"}


def page(found: list[dict[str, Any]]) -> Iterator[str]:
    """Lines for a reader: by table how many regions changed, and the cases that another way computes."""
    regions = [row for row in found if "measured" in row]
    for table in dict.fromkeys(row["table"] for row in regions):
        own = [row for row in regions if row["table"] == table]
        changed = [row for row in own if row["path"] != row["default"]]
        yield f"{table}: {len(own)} regions timed, {len(changed) or 'none'} changed for the better"
        for row in changed:
            gains = [1 / ratio for path, _, ratio, *_ in row["measured"] if path == row["path"]]
            gain = f"{min(gains):.2f} to {max(gains):.2f}"
            yield f"  {row['region']}: {row['path']}, {gain} times as fast as {row['default']}"
    timed = [row for row in found if "ratio" in row]
    slower = [row for row in timed if row["ratio"][1] > 1]
    cases = len(timed) + sum(row.get("shapes", 0) for row in found)
    yield f"{cases} shapes of the cases: {len(timed)} take another way than the default, {len(slower) or 'none'} slower"
    for row in timed:
        value, low, high = row["ratio"]
        case = f"{row['case']}, {row['shape']} ({row['region']})"
        yield f"  {case}: {row['path']} takes {value:.3f} [{low:.3f}, {high:.3f}] of the time"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuned", description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="cuda is the current GPU")
    given = parser.parse_args(words)
    load_operators()
    common = record.environment(given.device, 0.0)
    device = torch.device("cpu") if given.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    found = [{"date": datetime.date.today().isoformat(), **row, **common} for row in rows(device)]
    print(*page(found), sep="\n")
    if given.save:
        record.append(record.result_file(given.device, "tuned"), found)


if __name__ == "__main__":
    main()
