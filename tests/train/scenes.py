"""A COCO-format folder of coloured rectangles, small enough to be written for every test run."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jdkd.data.coco import CocoDetectionDataset, Split
from tests.detectors import CLASSES

CATEGORIES = (3, 7, 11)
SIZE = 64


def write_scenes(
    folder: Path,
    images: int = 12,
    classes: tuple[str, ...] = CLASSES,
    seed: int = 0,
    size: tuple[int, int] = (SIZE, SIZE),
    turned: tuple[int, ...] = (),
) -> CocoDetectionDataset:
    """One or two rectangles an image of ``size`` (height, width), whose colour is their class; the last is empty.

    The images numbered in ``turned`` are of width and height exchanged.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    sizes = [size[::-1] if image in turned else size for image in range(images)]
    for image, size in enumerate(sizes):
        pixels = generator.integers(90, 110, (*size, 3), dtype=np.uint8)
        for _ in range(generator.integers(1, 3) if image < images - 1 else 0):
            label = int(generator.integers(len(classes)))
            y, x = (int(generator.integers(0, side // 2)) for side in size)
            height, width = (int(generator.integers(14, side // 2)) for side in size)
            pixels[y : y + height, x : x + width] = 20
            pixels[y : y + height, x : x + width, label % 3] = 240
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 100,
                    "category_id": CATEGORIES[label],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / f"{image}.png")
    content = {
        "images": [
            {"id": i + 100, "file_name": f"{i}.png", "height": size[0], "width": size[1]}
            for i, size in enumerate(sizes)
        ],
        "annotations": annotations,
        "categories": [{"id": CATEGORIES[k], "name": name} for k, name in enumerate(classes)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoDetectionDataset(Split(folder, folder / "annotations.json"))
