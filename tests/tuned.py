"""Measurements of `jdkd tune` that are planted."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from jdkd import _dispatch, _tuned
from jdkd._tuned import Measured, Region
from jdkd.files import cache_folder

CPU = torch.device("cpu")


@contextlib.contextmanager
def tuned(table: str, device: torch.device = CPU, default: str = "default", **winners: str) -> Iterator[None]:
    """Inside, paths are said to take half of the default's time in regions of a table; ``winners`` are their names.

    They lie in a folder that no other process of the tests reads, beside the verdicts that all of them share.
    """
    found = {
        region: Region(path, default, "2026-11-29", (Measured(path, "a shape", 0.5, 0.4, 0.6),))
        for region, path in winners.items()
    }
    verdicts = cache_folder() / "verdicts"
    verdicts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", JDKD_CACHE=folder):
        (Path(folder) / "verdicts").symlink_to(verdicts.resolve())
        (Path(folder) / _tuned.FOLDER).mkdir()
        _tuned.write(device, {table: found})
        _dispatch.forget()
        try:
            yield
        finally:
            _dispatch.forget()
    _dispatch.forget()
