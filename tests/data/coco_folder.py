"""A COCO-format split of two plain pictures, for tests that spoil one thing in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jdkd.data import Split

WIDTH, HEIGHT = 40, 30


def image(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT, **changes}


def box(number: int, image_id: int, category_id: int = 7, bbox: Any = (5, 6, 10, 8), **changes: Any) -> dict[str, Any]:
    bbox = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **changes}


def content(**changes: Any) -> dict[str, Any]:
    """A sound annotation file: images 20 and 10, categories 90 ("dog") and 7 ("cat"), a box on each image."""
    sound = {
        "images": [image(20), image(10)],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [box(1, 20, 90), box(2, 10, 7, (1.5, 2.5, 3, 4))],
    }
    return {**sound, **changes}


def write_annotations(file: Path, what: Any) -> Path:
    """Writes text as it is and anything else as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    return file


def write_split(folder: Path, what: dict[str, Any] | None = None) -> Split:
    """Writes annotations and a picture of noise for each image that they list."""
    what = content() if what is None else what
    for place, record in enumerate(what["images"]):
        path = folder / "images" / record["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(place).integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return Split(folder / "images", write_annotations(folder / "instances.json", what), "train")
