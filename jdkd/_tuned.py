"""Which of several ways to compute something was measured faster on the device at hand than the one that runs unasked.

`jdkd tune` measures, and keeps what it finds under ``JDKD_CACHE``, one file a device, ``tuned/<environment>.json``,
where the environment is that of verdicts (:mod:`jdkd._verdicts`) and on a CPU the number of threads too: another
driver, another version or other sources, and nothing is known. A file appears whole or not at all. One that cannot be
read, or that is about another environment, counts as none, and that is said once.

The file is read at the first call on a device and then no more; :func:`forget` reads it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jdkd import _verdicts
from jdkd.files import cache_folder, write_whole
from jdkd.notices import say_once

FOLDER = "tuned"
_DEVICES = ("cpu", "cuda")


class Measured(NamedTuple):
    """Time of a path over that of the default, in one shape of a region, with its interval."""

    path: str
    shape: str
    ratio: float
    low: float
    high: float


class Region(NamedTuple):
    """What came of a region.

    Args:
        path: the fastest of those that were faster than the default in every shape; the default if none was.
        default: what runs without a measurement.
        date: of the measurement, ``2026-11-29``.
        measured: every path but the default in every shape.
    """

    path: str
    default: str
    date: str
    measured: tuple[Measured, ...] = ()

    def gain(self) -> tuple[float, float]:
        """The least and the largest number of times by which the path beat the default, over its shapes."""
        gains = [1 / row.ratio for row in self.measured if row.path == self.path]
        return min(gains, default=1.0), max(gains, default=1.0)


Regions = dict[str, dict[str, Region]]  # of a device, by table and region


class _Known(NamedTuple):
    """What is known of a device."""

    regions: Regions
    winners: Mapping[str, Mapping[str, str]]  # table -> region -> path, where it is not the default


_known: dict[torch.device, _Known] = {}
_NOTHING = _Known({}, {})


def has_winners(table: str, device: torch.device, beginning: str = "") -> bool:
    """Whether in a region of a table, one whose name begins so, another path than the default measured faster."""
    winners = _of(device).winners
    return table in winners and (not beginning or any(name.startswith(beginning) for name in winners[table]))


def path(table: str, region: str, device: torch.device) -> str | None:
    """The path that measured faster than the default in a region, if one did."""
    return _of(device).winners.get(table, {}).get(region)


def told(table: str, region: str, device: torch.device) -> str:
    """From where the choice of a region comes that has such a path, in words."""
    found = _of(device).regions[table][region]
    low, high = (f"{gain:.2f}" for gain in found.gain())
    times = low if low == high else f"{low} to {high}"
    return f"tuned on {machine(device)}, {found.date}: {times} times as fast as {found.default}"


def machine(device: torch.device) -> str:
    """What a device is called and, of a CPU, how many threads it is used by."""
    where = environment(device)
    threads = {None: "", "1": ", 1 thread"}.get(where.get("threads"), f", {where.get('threads')} threads")
    return f"{where['device']}{threads}"


def regions(device: torch.device) -> Regions:
    """All that is known of a device, by table and region."""
    return _of(device).regions


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement depends on."""
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {**_verdicts.environment(device), **threads}


def file_of(device: torch.device) -> Path | None:
    """Where the measurements of a device lie; None where there is no home to keep them in."""
    if (root := cache_folder()) is None:
        return None
    key = json.dumps(environment(device), sort_keys=True)
    return root / FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def write(device: torch.device, found: Regions) -> None:
    """Keeps measurements in place of what was there, and lets this process know.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    rows = {
        table: {name: {**each._asdict(), "measured": [row._asdict() for row in each.measured]} for name, each in of}
        for table, of in ((table, of.items()) for table, of in found.items())
    }
    content = json.dumps({"environment": environment(device), "regions": rows}, indent=1)
    write_whole(file_of(device), content + "\n", shared=True)
    forget()


def forget() -> None:
    """The next call on a device reads its file again."""
    _known.clear()


def _of(device: torch.device) -> _Known:
    found = _known.get(device)
    if found is None:
        found = _known[device] = _read(device) if device.type in _DEVICES else _NOTHING
    return found


def _read(device: torch.device) -> _Known:
    """What the file of a device says, if there is one and it is about this environment."""
    root = cache_folder()
    if root is None or not (root / FOLDER).is_dir():  # as nearly always, and sources need no hash
        return _NOTHING
    file = file_of(device)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["environment"] != environment(device):
            return _ignored(file, "is about another machine, or other versions")
        found = {
            str(table): {str(name): _region(each) for name, each in of.items()} for table, of in kept["regions"].items()
        }
    except FileNotFoundError:
        return _NOTHING
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return _ignored(file, f"cannot be read ({type(error).__name__}: {error})")
    winners = {
        table: {name: each.path for name, each in of.items() if each.path != each.default}
        for table, of in found.items()
    }
    return _Known(found, {table: of for table, of in winners.items() if of})


def _region(kept: Mapping[str, Any]) -> Region:
    measured = tuple(
        Measured(str(row["path"]), str(row["shape"]), *(float(row[key]) for key in ("ratio", "low", "high")))
        for row in kept["measured"]
    )
    if any(not row.ratio > 0 for row in measured):
        raise ValueError("a ratio of times is not positive")
    return Region(str(kept["path"]), str(kept["default"]), str(kept["date"]), measured)


def _ignored(file: Path, why: str) -> _Known:
    say_once(f"{file} {why}, and is ignored: kernels are chosen as without it; `jdkd tune` writes it anew")
    return _NOTHING
