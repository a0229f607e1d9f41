"""Which detectors are tested for what, read off what the tests are parametrised over: see :func:`table`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from benchmarks import markdown

OWN = "pan"  # a detector of tests/graph/networks.py that no framework has
NAMES = {
    "fasterrcnn": "Faster R-CNN",
    "fasterrcnn_v2": "Faster R-CNN v2",
    "maskrcnn": "Mask R-CNN",
    "maskrcnn_v2": "Mask R-CNN v2",
    "keypointrcnn": "Keypoint R-CNN",
    "retinanet": "RetinaNet",
    "retinanet_v2": "RetinaNet v2",
    "fcos": "FCOS",
    "ssd": "SSD",
    "ssdlite": "SSDlite",
    "atss": "ATSS",
    "gfl": "GFL",
    "reppoints": "RepPoints",
    OWN: "a module of your own (a PAN)",
}
TESTED, ASKED, REFUSED, NOT = "tested", "tested (slow)", "refused", "not tested"


@dataclass(frozen=True)
class Source:
    """What some tests are parametrised over.

    Args:
        module: of the tests, below ``tests``.
        names: of a collection in it, of families.
        says: what it means for a family to be in there.
    """

    module: str
    names: str
    says: str = TESTED

    def families(self) -> set[str]:
        """The families, by the keys of :data:`NAMES`."""
        return {key_of(name) for name in getattr(import_module(f"tests.{self.module}"), self.names)}


COLUMNS = {  # what is said first counts
    "distil": (Source("distill.test_every_family", "TAUGHT"),),
    "prune": (
        Source("rewrite.test_torchvision", "FAMILIES"),
        Source("detect.places", "KINDS"),  # of tests/detect/test_learning_heads.py
        Source("pool.test_any_detector", "NAMES"),
        Source("distill.test_every_family", "CUT"),
    ),
    "search": (
        Source("search.test_any_detector", "ASKED", ASKED),
        Source("search.test_any_detector", "FAMILIES"),
        Source("search.conftest", "FAMILIES"),
        Source("search.test_every_family", "QUICK"),
        Source("search.test_every_family", "FAMILIES", ASKED),
        Source("search.test_every_family", "REFUSED", REFUSED),
    ),
    "ONNX": (
        Source("export.test_families", "WRITTEN"),
        Source("export.test_families", "FAMILIES", ASKED),
        Source("export.test_families", "REFUSED", REFUSED),
    ),
    "pt2": (Source("export.test_families", "FAMILIES", ASKED), Source("export.test_families", "REFUSED", REFUSED)),
}


def key_of(name: str) -> str:
    """The key of a family's name, however it is written.

    Raises:
        ValueError: the table has no such row.
    """
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in NAMES:
        raise ValueError(f"tests speak of {name!r}, which is none of {', '.join(NAMES)}; give it a row")
    return key


def table(columns: dict[str, tuple[Source, ...]] | None = None) -> str:
    """A row for every family."""
    found = {title: _said(sources) for title, sources in (columns or COLUMNS).items()}
    rows = [[name, *(said.get(key, NOT) for said in found.values())] for key, name in NAMES.items()]
    return markdown.table(["detector", *found], "l", rows)


def _said(sources: Iterable[Source]) -> dict[str, str]:
    said: dict[str, str] = {}
    for source in sources:
        for family in source.families():
            said.setdefault(family, source.says)
    return said
