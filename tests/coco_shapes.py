"""Images and boxes of COCO's sizes after resizing, with as many classes, for tests of what is meant to train on it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jdkd.data import Split

SIZE = 1333, 800  # width, height


def coco_shapes(folder: Path, name: str, count: int = 1) -> Split:
    """A split of ``count`` images of noise, an object on each; those of another name are other images."""
    folder.mkdir(exist_ok=True)
    images, objects = [], []
    for number in range(1, count + 1):
        file = f"{name}-{number}.png"
        noise = np.random.default_rng([number, *name.encode()]).integers(0, 255, (SIZE[1] // 10, SIZE[0] // 10 + 1, 3))
        Image.fromarray(noise.astype(np.uint8)).resize(SIZE).save(folder / file)
        images.append({"id": number, "file_name": file, "width": SIZE[0], "height": SIZE[1]})
        box = {"bbox": [100, 120, 300, 200], "area": 60000, "iscrowd": 0}
        objects.append({"id": number, "image_id": number, "category_id": 7, **box})
    classes = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
    content = {"images": images, "annotations": objects, "categories": classes}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return Split(folder, folder / f"{name}.json", name)
