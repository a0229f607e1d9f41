"""Images a second that reach the training loop, and how long a large annotation file takes to open.

    python -m benchmarks.data_loading                      images of COCO's usual size, drawn here
    python -m benchmarks.data_loading --data DIR [DIR ..]  those of data sets in the COCO layout instead
    python -m benchmarks.data_loading --index              an annotation file as large as COCO's, opened twice
    python -m benchmarks.data_loading --page               print the tables of the rows that are kept

``--save`` appends rows to ``results/DEVICE/data_loading.jsonl``. A rate is of images over the processor time that all
processes took, the median over rounds: what one core is good for, whatever else runs on it; rows have it by the clock
too, which the table shows of what was measured on several cores. *decoded* is reading and decoding alone, *batches*
what training reads (``jdkd.data.batches``): decoded, mirrored by half, as floats.

A GPU that takes more images a second than ``batches`` gives by the clock waits for them: to keep it busy it needs as
many workers as its images a second are times those that one core is good for, each with a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from benchmarks import markdown, record
from jdkd.data import CocoDetectionDataset, Split, batches, read_image, resolve_split

OP = "data_loading"
WIDTH, HEIGHT = 640, 480
DRAWN = "drawn, of COCO's usual size"
BATCH = 8
LARGE = 118_000, 860_000  # images and objects, about those of COCO's train2017
HEADINGS = ("machine", "images", "size", "what is done", "images/s of one core (least to most)")


def drawn(folder: Path, count: int) -> CocoDetectionDataset:
    """JPEGs of about the size and the bytes of COCO's, smooth with some noise, with seven boxes each."""
    rng = np.random.default_rng(0)
    records, objects = [], []
    for number in range(1, count + 1):
        coarse = Image.fromarray(rng.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + rng.normal(0, 8, smooth.shape).astype(np.int16)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)
        records.append({"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT})
        for _ in range(7):
            x, y, width, height = rng.uniform(1, 200, 4).round(2).tolist()
            box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
            objects.append({"id": len(objects) + 1, "image_id": number, "category_id": 1, **box})
    content = {"images": records, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "all.json").write_text(json.dumps(content))
    return CocoDetectionDataset(Split(folder, folder / "all.json"))


def by_pillow(path: Path) -> None:
    with Image.open(path) as file:
        F.pil_to_tensor(file.convert("RGB"))


def processor_seconds() -> float:
    """What this process and those of its children that have ended have taken."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measured(images: int, run: Callable[[], object], rounds: int) -> record.Row:
    """Images a second by processor time, with the least and the most of all rounds, and by the clock."""
    clock, processor = [], []
    for _ in range(rounds):
        began, before = time.perf_counter(), processor_seconds()
        run()
        clock.append(images / (time.perf_counter() - began))
        processor.append(images / (processor_seconds() - before))
    spread = [round(min(processor), 1), round(max(processor), 1)]
    per_core, by_clock = (round(statistics.median(each), 1) for each in (processor, clock))
    return {"per_core": per_core, "per_core_spread": spread, "clock": by_clock, "rounds": rounds}


def rates(data: CocoDetectionDataset, images: int, rounds: int, workers: Sequence[int]) -> Iterator[record.Row]:
    """Rows of one data set: its files decoded, and read in batches by so many workers each."""
    files = data.files[:images]
    with Image.open(files[0]) as first:
        size = f"{first.width}x{first.height} {first.format}"
    kib = round(statistics.mean(file.stat().st_size for file in files) / 1024)
    common = {"op": OP, "row": "images", "size": f"{size}, {kib} KiB"}
    for name, read in (("Pillow", by_pillow), ("jdkd", read_image)):
        rate = measured(len(files), lambda read=read: [read(file) for file in files], rounds)
        yield {**common, "done": f"decoded by {name}", **rate}
    steps = -(-images // BATCH)
    for count in workers:
        how = {"batch_size": BATCH, "steps": steps, "seed": 0, "flip": 0.5, "by_aspect": True, "workers": count}
        rate = measured(steps * BATCH, lambda how=how: [None for _ in batches(data, **how)], rounds)
        yield {**common, "done": f"batches, {count or 'no'} worker{'s' * (count > 1)}", **rate}


def large(folder: Path, images: int, objects: int) -> Split:
    """As many images, links to a small one, and objects with polygons, in one annotation file."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    Image.new("RGB", (64, 48)).save(folder / "one.jpg")
    for number in range(images):
        os.symlink(folder / "one.jpg", folder / "images" / f"{number:012d}.jpg")
    corners, sides = rng.uniform(0, 30, (objects, 2)).round(2), rng.uniform(1, 18, (objects, 2)).round(2)
    owners, kinds = rng.integers(0, images, objects).tolist(), rng.integers(1, 81, objects).tolist()
    polygon = rng.uniform(0, 48, 40).round(2).tolist()
    with open(folder / "all.json", "w") as file:
        records = ({"id": k, "file_name": f"{k:012d}.jpg", "width": 64, "height": 48} for k in range(images))
        file.write('{"images": [' + ",".join(map(json.dumps, records)) + '], "annotations": [')
        for k in range(objects):
            place = {"image_id": owners[k], "category_id": kinds[k], "bbox": [*corners[k].tolist(), *sides[k].tolist()]}
            rest = {"area": float(sides[k].prod()), "iscrowd": 0, "segmentation": [polygon]}
            file.write("," * (k > 0) + json.dumps({"id": k + 1, **place, **rest}))
        classes = ({"id": k, "name": f"class {k}"} for k in range(1, 81))
        file.write('], "categories": [' + ",".join(map(json.dumps, classes)) + "]}")
    return Split(folder / "images", folder / "all.json")


OPENED = """
import json, resource, sys, time
from pathlib import Path
from jdkd.data import CocoDetectionDataset, Split
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began, worked = time.perf_counter(), time.process_time()
data = CocoDetectionDataset(Split(Path(sys.argv[1]), Path(sys.argv[2])))
took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked}
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
boxes = sum(len(labels) for labels in data.labels)
print(json.dumps({"images": len(data), "boxes": boxes, **took, "mib": most / 1024, "mib_before": before / 1024}))
"""


def opened(split: Split, cache: Path) -> record.Row:
    """A data set opened in a process of its own: how long that takes, and the memory of the process at most."""
    command = [sys.executable, "-W", "ignore", "-c", OPENED, str(split.images), str(split.annotations)]
    environment = os.environ | {"JDKD_CACHE": str(cache)}
    how = {"capture_output": True, "text": True, "check": True, "cwd": record.ROOT, "env": environment}
    return json.loads(subprocess.run(command, **how).stdout)


def openings(folder: Path) -> Iterator[record.Row]:
    """Rows of a large annotation file: opened first, and again."""
    split = large(folder, *LARGE)
    size = split.annotations.stat().st_size
    for time_of in ("first", "again"):
        found = {name: round(value, 2) for name, value in opened(split, folder / "cache").items()}
        yield {"op": OP, "row": "index", "opened": time_of, "bytes": size, **found}


def table(rows: Sequence[record.Row]) -> str:
    """Markdown: images a second, and what it takes to open a large annotation file; the latest row of each."""
    keys = ("device", "row", "images", "done", "opened")
    latest = {tuple(row.get(name) for name in keys): row for row in rows}
    read = [row for row in latest.values() if row["row"] == "images"]
    index = [row for row in latest.values() if row["row"] == "index"]
    parts = []
    if read:
        lines = []
        for row in read:
            low, high = row["per_core_spread"]
            rate = f"{row['per_core']:.0f} ({low:.0f} to {high:.0f})"
            if row["cores"] > 1 and row["done"].startswith("batches"):
                rate += f", {row['clock']:.0f} by the clock on {row['cores']}"
            lines.append([row["device"], row["images"], row["size"], row["done"], rate])
        parts.append(markdown.table(HEADINGS, "llllr", lines))
    if index:
        heads = (
            "machine",
            "annotations of",
            "opened",
            "processor time",
            "by the clock",
            "memory of the process at most",
        )
        lines = []
        for row in index:
            what = f"{row['images']:,} images, {row['boxes']:,} objects, {row['bytes'] / 1e6:.0f} MB"
            took = [f"{row['processor_seconds']:.1f} s", f"{row['seconds']:.1f} s", f"{row['mib']:.0f} MiB"]
            lines.append([row["device"], what, row["opened"], *took])
        parts.append(markdown.table(heads, "lllr", lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="folders in the COCO layout, instead of images drawn here")
    parser.add_argument("--images", type=int, default=800, help="images a round, decoded at most [800]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    if given.page:
        print(table(record.load(sorted(record.RESULTS.glob(f"*/{OP}.jsonl")))))
        return
    warnings.simplefilter("ignore")  # of more workers than cores
    torch.set_num_threads(1)
    facts = {"cores": len(os.sched_getaffinity(0)), **record.environment("cpu", 0)}
    del facts["copy_bytes_per_s"]  # which was not measured
    found = []
    with tempfile.TemporaryDirectory() as place:
        for row in _asked(given, Path(place)):
            found.append({**row, **facts})
            if given.save:
                record.append(record.result_file("cpu", OP), found[-1:])
            print(json.dumps(found[-1]), flush=True)
    print(table(found))


def _asked(given: argparse.Namespace, place: Path) -> Iterator[record.Row]:
    if given.index:
        yield from openings(place)
        return
    sets = {folder.name: CocoDetectionDataset(resolve_split("train", folder)) for folder in given.data or ()}
    for name, data in (sets or {DRAWN: drawn(place, given.images)}).items():
        yield from ({**row, "images": name} for row in rates(data, given.images, given.rounds, given.workers))


if __name__ == "__main__":
    main()
