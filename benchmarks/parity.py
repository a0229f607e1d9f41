"""Exported files against their detectors, on photographs: ``python -m benchmarks.parity --data FOLDER``.

    python -m benchmarks.parity --data FOLDER --formats onnx pt2     every family, whole and with half of its channels

An ONNX file is compared in onnxruntime, and in OpenVINO too where that is installed.

The detectors are those of ``tests/export/tiny.py``: of every family that can be exported, small, with random weights
that are far from each other, so that there is much to find and no mAP to compare; `jdkd export` compares that of a
trained one. One row a file is appended as soon as it is compared; the command fails where one is not within tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import markdown, record
from jdkd.data import CocoDetectionDataset, resolve_split
from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.export.opening import checking
from jdkd.export.parity import TOLERANCES, Parity, parity
from jdkd.export.writing import exported
from jdkd.rewrite import Rewrite
from tests.export.tiny import FAMILIES, made

OP = "parity"
IMAGES = 50
ONLY = {"onnx": "onnxruntime", "pt2": "torch"}  # what rows without a runtime were made in


def halved(model: nn.Module) -> nn.Module:
    """A copy with the first half of the channels of every group."""
    topology = read(model)
    keep = {group.name: range(group.shrunk(0.5)) for group in topology.groups}
    return Rewrite(keep=keep).apply(model, topology).eval()


def rows(families: Sequence[str], formats: Sequence[str], images: Sequence[Any]) -> Iterator[record.Row]:
    """One a family, shape, format and runtime, as soon as it is there.

    Args:
        families: of :data:`FAMILIES`.
        formats: ``"onnx"`` or ``"pt2"``.
        images: ``([3, H, W] uint8, target)``.
    """
    for family in families:
        whole = made(family)
        for shape, model in (("whole", whole), ("half of its channels", halved(whole))):
            for form in formats:
                content = exported(model, form)
                for runtime, opened in checking(form).items():
                    found = parity(model, opened(content, "cpu"), images)
                    yield _row({"case": family, "shape": shape, "format": form, "runtime": runtime}, model, found)


def _row(what: record.Row, model: nn.Module, found: Parity) -> record.Row:
    return {
        "op": OP,
        **what,
        "dtype": "fp32",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images": found.images,
        "detections": found.same + found.other,
        "same": found.same,
        "box": round(found.box, 6),
        "score": float(f"{found.score:.3g}"),
        "mask_iou": round(1 - found.mask, 6),
        "complaint": found.complaint(TOLERANCES["fp32"]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": record.device_name("cpu"),
        "torch": torch.__version__,
        "commit": record.commit(),
    }


def table(given: Sequence[record.Row]) -> str:
    """Markdown: a line a family and shape, the last comparison of each format in each runtime."""
    last = {(row["case"], row["shape"], row["format"], row.get("runtime", ONLY[row["format"]])): row for row in given}
    headings = ("detector", "shape", "format", "in", "images", "detections that agree", "boxes within", "scores within")
    cells = (
        (*what, row["images"], f"{row['same']} of {row['detections']}", f"{row['box']:.2g} px", f"{row['score']:.2g}")
        for what, row in last.items()
    )
    return markdown.table(headings, "llllr", cells)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="photographs in the COCO layout; those of val")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--formats", nargs="+", choices=("onnx", "pt2"), default=["onnx", "pt2"])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/DEVICE/parity.jsonl")
    asked = parser.parse_args(words)
    out = asked.out or record.result_file("cpu", OP)
    record.require_published(out)
    images = CocoDetectionDataset(resolve_split("val", asked.data))
    images = images.subset(range(min(asked.images, len(images))))
    apart = []
    for row in rows(asked.families, asked.formats, images):
        record.append(out, [row])
        print(table([row]).splitlines()[-1], flush=True)
        if row["complaint"] is not None:
            where = f"{row['case']}, {row['shape']}, {row['format']} in {row['runtime']}"
            apart.append(f"{where}: {row['complaint']}")
    if apart:
        raise InputError("; ".join(apart))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"{error}")
