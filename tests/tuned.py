"""Measurements of `jdkd tune` that are planted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from jdkd import _dispatch, _tuned
from jdkd._tuned import Measured, Region

CPU = torch.device("cpu")


@contextlib.contextmanager
def tuned(table: str, device: torch.device = CPU, **winners: str) -> Iterator[None]:
    """Inside, paths are said to take half of the default's time in regions of a table; ``winners`` are their names."""
    found = {
        region: Region(path, "default", "2026-11-29", (Measured(path, "a shape", 0.5, 0.4, 0.6),))
        for region, path in winners.items()
    }
    file = _tuned.file_of(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    _tuned.write(device, {**_tuned.regions(device), table: found})
    _dispatch.forget()
    try:
        yield
    finally:
        file.unlink()
        _dispatch.forget()
