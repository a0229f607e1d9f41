"""What a machine's clocks did while it was measured: read between blocks of rounds, never set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from jdkd.errors import InputError, said

SLOWER = 0.9  # a clock below so much of the fastest block's counts as fallen
STOLEN = 0.05  # of a block's time that other guests of a virtual machine may take unsaid
REASONS = {  # bits of NVML's clocks event reasons; idle (1) and clocks that were set on purpose (2) slow nothing down
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
Reading = dict[str, Any]
"""What was read at once; None for what this machine does not show."""


class Watch(Protocol):
    """Reads clocks and what slows them down.

    Args:
        name: how a report calls it.
    """

    name: str

    def read(self) -> Reading:
        """The state now: ``mhz``, ``throttled`` (reasons now in force) and ``counts`` (of events, which only grow)."""


class NotWatched:
    """Reads nothing, and says why.

    Args:
        reason: why not.
    """

    def __init__(self, reason: str) -> None:
        self.name = f"not read: {reason}"

    def read(self) -> Reading:
        return {}


class CpuWatch:
    """What Linux shows of the processors that this process may run on.

    Clocks and thermal events are those of the driver (cpufreq); virtual machines often show neither. What a container's
    quota and other guests of the machine took is counted beside them.

    Args:
        root: where ``/sys`` and ``/proc`` lie.
        cores: numbers of the processors; by default those that this process may run on.
    """

    name = "cpufreq, thermal events, quota and stolen time, as Linux shows them"

    def __init__(self, root: Path = Path("/"), cores: Sequence[int] | None = None) -> None:
        here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        self._root, self._cores = root, sorted(here if cores is None else cores)

    def read(self) -> Reading:
        cores = [self._root / f"sys/devices/system/cpu/cpu{core}" for core in self._cores]
        khz = [_number(core / "cpufreq/scaling_cur_freq") for core in cores]
        heat = [_number(core / "thermal_throttle/core_throttle_count") for core in cores]
        quota = dict(map(str.split, _lines(self._root / "sys/fs/cgroup/cpu.stat")))
        first = next(iter(_lines(self._root / "proc/stat")), "").split()  # cpu, then ticks of all processors
        ticks = [int(word) for word in first[1:9]]
        return {
            "mhz": None if None in khz or not khz else max(khz) / 1e3,  # idle ones are slow
            "throttled": [],
            "counts": {
                "thermal events": None if None in heat or not heat else sum(heat),
                "periods cut by the container's quota": int(quota["nr_throttled"]) if "nr_throttled" in quota else None,
            },
            "ticks": sum(ticks) if len(ticks) == 8 else None,
            "stolen": ticks[7] if len(ticks) == 8 else None,
        }


class NvmlWatch:
    """Clocks, temperature, power and throttle reasons of an NVIDIA GPU, through the package `nvidia-ml-py`.

    Args:
        device: a CUDA device.

    Raises:
        InputError: the package is missing, or the driver refuses a reading, which is not the same as all being well.
    """

    name = "NVML"

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            raise InputError(
                "clocks and throttling of a GPU are read with nvidia-ml-py, which is not installed; "
                "pip install nvidia-ml-py."
            ) from None
        self._nvml = pynvml
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._read("nvmlInit")
        self._handle = self._read("nvmlDeviceGetHandleByUUID", uuid)

    def read(self) -> Reading:
        handle, nvml = self._handle, self._nvml
        reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return {
            "mhz": self._read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            "celsius": self._read("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": self._read("nvmlDeviceGetPowerUsage", handle) / 1e3,
            "throttled": [reason for bit, reason in REASONS.items() if reasons & bit],
            "counts": {},
        }

    def _read(self, name: str, *given: Any) -> Any:
        call: Callable[..., Any] = getattr(self._nvml, name)
        try:
            return call(*given)
        except self._nvml.NVMLError as error:
            raise InputError(
                f"the NVIDIA driver refused {name} ({said(error)}), so nobody knows whether the GPU was slowed down; "
                "measure where it tells."
            ) from error


def watch_for(device: torch.device) -> Watch:
    """What reads a device's clocks; on a GPU without nvidia-ml-py nothing does, and the report says so."""
    if device.type != "cuda":
        return CpuWatch()
    try:
        import pynvml  # noqa: F401
    except ImportError:
        return NotWatched("nvidia-ml-py is not installed")
    return NvmlWatch(device)


def driver_of(device: torch.device) -> str | None:
    """Version of a GPU's driver; None without nvidia-ml-py."""
    watch = watch_for(device)
    return watch._read("nvmlSystemGetDriverVersion") if isinstance(watch, NvmlWatch) else None


def unreadable(readings: Sequence[Reading]) -> list[str]:
    """What none of the readings shows, in words."""
    if not readings or not readings[0]:
        return ["clocks", "throttling"]
    last = readings[-1]
    shown = {"clocks": last["mhz"], **last["counts"]} | ({"stolen time": last["stolen"]} if "stolen" in last else {})
    return [name for name, value in shown.items() if value is None]


def slowed(readings: Sequence[Reading]) -> list[str]:
    """What slowed the machine down between the first reading and the last, a sentence each; nothing where nothing did.

    Args:
        readings: one before the first block of rounds, then one after each.
    """
    found: dict[str, list[int]] = {}
    clocks = [reading["mhz"] for reading in readings if reading.get("mhz")]
    for block, (before, after) in enumerate(itertools.pairwise(readings), 1):
        if not after:
            continue
        if after["mhz"] and after["mhz"] < SLOWER * max(clocks):
            found.setdefault(f"the clock fell to {min(clocks):.0f} of {max(clocks):.0f} MHz", []).append(block)
        for reason in after["throttled"]:
            found.setdefault(f"throttled ({reason})", []).append(block)
        for name, count in after["counts"].items():
            if count is not None and count > before["counts"][name]:
                found.setdefault(name, []).append(block)
        if _stolen(before, after) > STOLEN:
            found.setdefault(f"other guests took more than {STOLEN:.0%} of the processors", []).append(block)
    return [f"{what} in {len(blocks)} of {len(readings) - 1} blocks" for what, blocks in found.items()]


def _stolen(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The part of the processors' time between two readings that other guests of the machine took."""
    if after.get("stolen") is None or not after["ticks"] > before["ticks"]:
        return 0.0
    return (after["stolen"] - before["stolen"]) / (after["ticks"] - before["ticks"])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # not shown on this machine
        return []


def _number(file: Path) -> float | None:
    lines = _lines(file)
    return float(lines[0]) if lines else None
