"""Annotation files without any image, sound until a test spoils them one thing at a time."""

import json
from pathlib import Path
from typing import Any

from jdkd.data.annotations import Annotations, inspect_annotations
from jdkd.data.problems import refuse

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


def only(*annotations: dict[str, Any]) -> dict[str, Any]:
    return content(annotations=list(annotations))


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def write_annotations(file: Path, what: Any) -> Path:
    """Writes text as it is and anything else as JSON."""
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    return file


def read_annotations(path: Path, strict: bool = False) -> Annotations:
    """What a data set makes of its annotation file: what was put right is said, anything else refused."""
    annotations, problems = inspect_annotations(path)
    refuse(problems, strict)
    return annotations
