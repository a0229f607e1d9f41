"""See :func:`known_runtimes`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from jdkd.export.writing import exported
from jdkd.latency.exported import runtimes_with
from jdkd.latency.runtimes import Runtime

WEIGHTS_SHA256 = "weights_sha256"
"""Attribute of a detector that says of which file its weights are; an exported file says it then."""


def known_runtimes() -> dict[str, Runtime]:
    """All runtimes that a detector can be timed in, by name; those of files run what this package writes."""
    return runtimes_with(_written)


def _written(model: nn.Module, file: Path, half: bool, counting: bool) -> None:
    weights = getattr(model, WEIGHTS_SHA256, None)
    file.write_bytes(exported(model, "onnx", half=half, weights=weights, counting=counting))
