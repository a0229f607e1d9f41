"""COCO-format folders of a few small images, sound until a test damages them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jdkd.data import Split

WIDTH, HEIGHT = 24, 16


def annotations(images: int = 3) -> dict[str, Any]:
    """Two categories, 7 and 3 in that order; image 10 + i holds i boxes of category 3 and one crowd of 7."""
    records = [
        {"id": 100 + 10 * i + j, "image_id": 10 + i, "category_id": 3, "bbox": [1 + j, 2, 4, 5], "area": 20}
        for i in range(images)
        for j in range(i)
    ]
    crowds = [
        {"id": 900 + i, "image_id": 10 + i, "category_id": 7, "bbox": [0, 0, 9, 9], "area": 50, "iscrowd": 1}
        for i in range(images)
    ]
    return {
        "info": {},
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in reversed(range(images))
        ],
        "annotations": records + [{**crowd, "segmentation": {"size": [16, 24], "counts": "x"}} for crowd in crowds],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }


def write(
    folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None, images: int = 3, name: str = "val"
) -> Split:
    """Write a folder whose image i is of the constant colour (i, 0, i) but for one white row; `change` edits it."""
    content = annotations(images)
    change(content)
    split = Split(folder / f"{name}2017", folder / "annotations" / f"instances_{name}2017.json", name)
    for path in (split.images, split.annotations.parent):
        path.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        pixels = np.full((HEIGHT, WIDTH, 3), (i, 0, i), dtype=np.uint8)
        pixels[0, : WIDTH // 2] = 255
        Image.fromarray(pixels).save(split.images / f"{i}.png")
    split.annotations.write_text(json.dumps(content))
    return split
