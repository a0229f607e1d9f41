"""Makes searches whose results the pages show: a base, and a joint search from it, over seeds.

python -m benchmarks.proof digit_scenes_deep FOLDER                seeds 0 to 2, one after the other
python -m benchmarks.proof blood_cells_deep FOLDER --data DIR --seeds 1 2

Both carry on what FOLDER holds and write on one thread what `benchmarks.searches` keeps. Whether a base no longer gains
is judged by the control of its search: the base, trained on for as long as its student, without a change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record, searches
from jdkd.data import resolve_splits


@dataclass(frozen=True)
class Recipe:
    """One kind of base and its search.

    Args:
        data: how its images are drawn, anew for each seed; None for photographs that are given, which are halved.
        model: flags of `jdkd train` for what the base is.
        batch_size, amp: of every training.
        sizes: short sides in pixels of the images of every training, where they are several.
        steps: of the base.
        times: as many steps the search may take, pool included, over those of the base; 2 is the most it should cost.
        targets: latencies over the base's, a student for each.
        lr: peak learning rate of every training.
        runtime: what students are timed in, and are to be fast in.
    """

    data: str | None
    model: str
    batch_size: int
    steps: int
    times: float = 1.6
    targets: str = "0.53"
    lr: float = 2e-3
    sizes: str = ""
    amp: str = "bf16"
    runtime: str = "eager"

    @property
    def budget(self) -> int:
        """Steps of the search."""
        return round(self.times * self.steps)


_RESNET = "--backbone resnet18 --norm batch --width 0.75 --fpn 64"
_R50 = "--backbone resnet50 --norm batch --width 0.25 --fpn 64"
_DEEP = "--backbone resnet101 --norm batch --width 0.25 --fpn 64"  # the paper's depth, at a width for one core
_SCENES = "--train 400 --val 400 --size 192"
RECIPES = {
    "digit_scenes_deep": Recipe(_SCENES, f"--model fcos {_DEEP} --min-size 192 --max-size 192", 4, 6000, times=2),
    "digit_scenes_deep_long": Recipe(
        _SCENES, f"--model fcos {_DEEP} --min-size 192 --max-size 192", 4, 15000, times=0.6
    ),
    "digit_scenes_deep_sizes": Recipe(
        _SCENES,
        f"--model fcos {_DEEP} --min-size 192 --max-size 192",
        4,
        15000,
        times=0.6,
        sizes="160 176 192 208 224",
    ),
    "digit_scenes_deep_front": Recipe(
        _SCENES, f"--model fcos {_DEEP} --min-size 192 --max-size 192", 4, 6000, times=2, targets="0.75,0.53,0.35"
    ),
    "digit_scenes_r50": Recipe(
        "--train 400 --val 400 --size 128", f"--model fcos {_R50} --min-size 128 --max-size 128", 4, 5000
    ),
    "blood_cells_deep": Recipe(None, f"--model fcos {_DEEP} --min-size 120 --max-size 160", 4, 2000),
    "blood_cells_deep_short": Recipe(None, f"--model fcos {_DEEP} --min-size 120 --max-size 160", 4, 2000, times=0.4),
    "blood_cells_deep_short_onnxruntime": Recipe(
        None, f"--model fcos {_DEEP} --min-size 120 --max-size 160", 4, 2000, times=0.4, runtime="onnxruntime"
    ),
    "blood_cells_deep_front": Recipe(
        None, f"--model fcos {_DEEP} --min-size 120 --max-size 160", 4, 2000, times=2, targets="0.75,0.53,0.35"
    ),
    "blood_cells_deep_two_stage": Recipe(
        None, f"--model fasterrcnn {_DEEP} --box-head 128 --min-size 180 --max-size 240", 4, 4000
    ),
    "blood_cells_deep_two_stage_front": Recipe(
        None,
        f"--model fasterrcnn {_DEEP} --box-head 128 --min-size 180 --max-size 240",
        4,
        4000,
        times=2,
        targets="0.75,0.53,0.35",
    ),
    "digit_scenes_128": Recipe(
        "--train 400 --val 400 --size 128", f"--model fcos {_RESNET} --min-size 128 --max-size 128", 4, 3000, times=2
    ),
    "blood_cells": Recipe(None, f"--model fcos {_RESNET} --min-size 144 --max-size 192", 4, 2000, times=2),
}
ONE_STUDENT = [name for name, recipe in RECIPES.items() if "," not in recipe.targets]
"""Those whose searches have a single target, and so a student of which more can be asked."""


def run(recipe: Recipe, folder: Path, data: Path | None, seed: int) -> Path:
    """Trains a base and searches from it; returns the folder of the search."""
    base, out = folder / f"base-{seed}", folder / f"search-{seed}"
    common = flags(recipe, images(recipe, folder, data, seed), seed)
    jdkd("train", "--out", base, *recipe.model.split(), "--steps", recipe.steps, *common)
    asked = ("--steps", recipe.budget, "--targets", recipe.targets, "--runtime", recipe.runtime)
    jdkd("search", "--base", base, "--out", out, *asked, *common)
    return out


def flags(recipe: Recipe, data: Path, seed: int) -> tuple[object, ...]:
    """What all trainings of a seed have in common."""
    common = ("--data", data, "--batch-size", recipe.batch_size, "--lr", recipe.lr, "--amp", recipe.amp)
    sizes = ("--train-sizes", *recipe.sizes.split()) if recipe.sizes else ()
    return (*common, *sizes, "--seed", seed, "--resume")


def images(recipe: Recipe, folder: Path, data: Path | None, seed: int) -> Path:
    """The folder of a seed's images, drawn or halved where it is not there yet."""
    if not recipe.data:
        return halved(data, folder / "data")
    jdkd("data", "digits", folder / f"data-{seed}", *recipe.data.split(), "--seed", seed, "--resume")
    return folder / f"data-{seed}"


def halved(data: Path, folder: Path) -> Path:
    """Photographs at half their height and width: what reads and resizes them is no part of what is compared."""
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.part")
        for split in resolve_splits(data):
            content = json.loads(split.annotations.read_text())
            file, images = making / "annotations" / split.annotations.name, making / split.images.name
            for place in (file.parent, images):
                place.mkdir(parents=True, exist_ok=True)
            for image in content["images"]:
                with Image.open(split.images / image["file_name"]) as photo:
                    photo.reduce(2).save(images / image["file_name"], quality=95)
                image |= {"width": (image["width"] + 1) // 2, "height": (image["height"] + 1) // 2}
            for one in content["annotations"]:
                one |= {"bbox": [side / 2 for side in one["bbox"]], "area": one["area"] / 4}
                if one.get("segmentation"):
                    one["segmentation"] = _halved_mask(one["segmentation"])
            file.write_text(json.dumps(content))
        making.rename(folder)
    return folder


def _halved_mask(given: Any) -> Any:
    """Polygons, or run lengths of one pixel in four, as :func:`halved` keeps the sizes."""
    if not isinstance(given, dict):
        return [[side / 2 for side in polygon] for polygon in given]
    from pycocotools import mask

    lengths = mask.frPyObjects(given, *given["size"]) if isinstance(given["counts"], list) else given
    small = mask.encode(np.asfortranarray(mask.decode(lengths)[::2, ::2]))
    return small | {"counts": small["counts"].decode()}


def jdkd(*words: object) -> None:
    """One command on one thread: a student that misses its target is a result too."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    ended = subprocess.run([sys.executable, "-m", "jdkd", *map(str, words)], env=os.environ | threads, check=False)
    if ended.returncode and not (words[0] == "search" and (Path(str(words[4])) / "result.json").exists()):
        raise SystemExit(f"jdkd {' '.join(map(str, words))} ended with {ended.returncode}")


def of_finished(doc: str | None) -> argparse.ArgumentParser:
    """The command line of what reads finished searches for one student: which kind, where they lie, which seeds; or
    nothing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ONE_STUDENT, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(RECIPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="photographs in the COCO layout")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args(arguments)
    recipe = RECIPES[asked.name]
    torch.set_num_threads(1)  # what the searches are kept under
    if (recipe.data is None) != (asked.data is not None):
        parser.error(f"{asked.name} {'draws its own images' if recipe.data else 'needs --data, a folder of images'}")
    for seed in asked.seeds:
        found = searches.collect([run(recipe, asked.folder, asked.data, seed)])
        record.append(record.result_file("cpu", asked.name), found)
    print(searches.table(record.load(sorted(record.RESULTS.glob(f"*/{asked.name}.jsonl")))))


if __name__ == "__main__":
    main(sys.argv[1:])
