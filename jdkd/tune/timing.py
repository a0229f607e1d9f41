"""What `jdkd tune` tells the time with, and the inputs that it goes through."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from jdkd.latency.clock import Clock, CpuClock, HostClock
from jdkd.tune.shapes import copied, nbytes

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL_CACHE = 32 << 20  # bytes, of a processor that does not tell
MOST_SETS = 512
SLEEP, LONGEST_SLEEP = 200_000, 3_200_000  # cycles of a GPU, some 0.1 and 1.7 ms: a launch takes the host less


class BehindASleep:
    """Time of a GPU between two events around a call that was queued while the GPU slept.

    So the host's time for its launches does not count, which is behind the GPU's in training. A sleep that ended before
    all was queued, as a gradient of several launches takes the host longer, is twice as long from then on, and the call
    is timed again; beyond :data:`LONGEST_SLEEP` the host waits for the GPU itself, and that counts.
    """

    name = "CUDA events behind a sleep"

    def __init__(self, device: torch.device) -> None:
        self.device, self.cycles = device, SLEEP

    def time(self, call: Callable[[], object]) -> float:
        """Runs `call` and returns the ms between the events."""
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(self.device):
                torch.cuda._sleep(self.cycles)
                begin.record()
                call()
                end.record()
                slept = not begin.query()  # until the last launch was queued
                end.synchronize()
            if slept or self.cycles >= LONGEST_SLEEP:
                return begin.elapsed_time(end)
            self.cycles *= 2


def clock_of(device: torch.device) -> Clock:
    """The clock that a device is timed with; where a CPU is used by one thread, its own time, in which nobody else's
    work counts."""
    if device.type == "cuda":
        return BehindASleep(device)
    return CpuClock() if torch.get_num_threads() == 1 else HostClock()


def rotated(make: Callable[[], Any]) -> list[Any]:
    """Sets of inputs of which three times the last-level cache is touched before one comes again, where
    :data:`MOST_SETS` are enough for that."""
    first = make()
    device = next(leaf.device for leaf in tree_leaves(first) if isinstance(leaf, torch.Tensor))
    count = math.ceil(3 * last_level_cache(device) / max(1, nbytes(first)))
    return [first, *(copied(first) for _ in range(min(MOST_SETS, max(2, count)) - 1))]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache of a device, as far as it tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        sizes = [file.read_text().strip() for file in CACHE.glob("index*/size")]
    except OSError:
        return USUAL_CACHE
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=USUAL_CACHE)
