"""Images a second that reach the training loop, and what limits them: ``python -m benchmarks.data_loading``.

Photographs of COCO's usual size, smooth with some noise, are written as JPEG into a folder that is removed afterwards;
``--data DIR`` reads those of a data set in the COCO layout instead. Rows are JSON lines; a figure is the median over
rounds, of images a second by the clock, and by the processor time that all processes took: what one core is good for,
whatever else runs on it.

=======  ============================================================================================================
row      what is done with an image
=======  ============================================================================================================
decode   nothing else, by Pillow and as jdkd does
batches  what training reads (``jdkd.data.batches``): decoded, mirrored by half, as floats; by number of workers
=======  ============================================================================================================

A GPU that takes more images a second than ``batches`` gives by the clock waits for them: to keep it busy it needs as
many workers as its images a second are times those that one core is good for, each with a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as F

from benchmarks.record import device_name
from jdkd.data import CocoDetectionDataset, Split, batches, read_image, resolve_split

WIDTH, HEIGHT = 640, 480
BATCH = 8


def photographs(folder: Path, count: int) -> CocoDetectionDataset:
    """Images of about the size and the bytes of COCO's, with seven boxes each."""
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


def measured(images: int, run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Images a second by the clock, and by processor time."""
    clock, processor = [], []
    for _ in range(rounds):
        began, before = time.perf_counter(), processor_seconds()
        run()
        clock.append(images / (time.perf_counter() - began))
        processor.append(images / (processor_seconds() - before))
    return {"clock": round(statistics.median(clock), 1), "processor": round(statistics.median(processor), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the COCO layout, instead of photographs made here")
    parser.add_argument("--images", type=int, default=160, help="images a round [160]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of more workers than cores
    with tempfile.TemporaryDirectory() as place:
        data = CocoDetectionDataset(resolve_split("train", given.data)) if given.data else None
        data = data or photographs(Path(place), given.images)
        files = data.files[: given.images]
        size = round(statistics.mean(file.stat().st_size for file in files) / 1024)
        facts = {"device": device_name("cpu"), "cores": len(os.sched_getaffinity(0)), "KiB an image": size}
        for name, read in (("Pillow", by_pillow), ("jdkd", read_image)):
            rate = measured(len(files), lambda read=read: [read(file) for file in files], given.rounds)
            print(json.dumps({"row": "decode", "by": name, **rate, **facts}), flush=True)
        steps = -(-given.images // BATCH)
        for workers in given.workers:
            how = {"batch_size": BATCH, "steps": steps, "seed": 0, "flip": 0.5, "by_aspect": True, "workers": workers}
            rate = measured(steps * BATCH, lambda how=how: [None for _ in batches(data, **how)], given.rounds)
            print(json.dumps({"row": "batches", "workers": workers, **rate, **facts}), flush=True)


if __name__ == "__main__":
    main()
