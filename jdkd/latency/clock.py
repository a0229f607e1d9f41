"""What tells the time, and what is recorded about the machine that it was told on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision

from jdkd.latency.watching import driver_of

CPUINFO = Path("/proc/cpuinfo")


class Clock(Protocol):
    """Times one call.

    Args:
        name: what a report calls it.
    """

    name: str

    def time(self, call: Callable[[], object]) -> float:
        """Run `call` and return the milliseconds that it took."""


class HostClock:
    """Wall time of the host, `time.perf_counter`."""

    name = "perf_counter"

    def time(self, call: Callable[[], object]) -> float:
        """Run `call` and return its wall time in ms."""
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


class CudaClock:
    """Time between two events on an NVIDIA device's current stream, whichever device is the current one."""

    name = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Callable[[], object]) -> float:
        """Run `call` on an idle device and return the ms between the events around it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        stream = torch.cuda.current_stream(self.device)
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end)


class CpuClock:
    """Processor time of the calling thread: what one thread would take if nobody else used the machine.

    For experiments on a busy machine, with ``torch.set_num_threads(1)``; work of other threads does not count.
    """

    name = "thread_time"

    def time(self, call: Callable[[], object]) -> float:
        """Run `call` and return the ms of processor time that it took."""
        begin = time.thread_time()
        call()
        return 1e3 * (time.thread_time() - begin)


def clock_for(device: torch.device) -> HostClock | CudaClock:
    """The clock that a device is timed with."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor where the operating system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _model_of_processor() -> str | None:
    """Family, model and stepping, as virtual machines often give processors that differ one name."""
    found, names = _cpuinfo(), ("cpu family", "model", "stepping")
    return " ".join(f"{name} {found[name]}" for name in names if name in found) or None


def _governor() -> str | None:
    """How Linux sets the processors' clock, where it tells."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Everything about this process that a latency depends on, JSON-able.

    Args:
        device: where the models run.

    Returns:
        Device, clock, threads, processors, versions and, on a GPU, driver, TF32 and cuDNN: nothing that changes while
        this process runs, so that two that differ cannot be compared.
    """
    facts: dict[str, Any] = {
        "device": str(device),
        "device_name": device_name(device),
        "processor": _model_of_processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "clock": clock_for(device).name,
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "governor": _governor(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        facts |= {
            "driver": driver_of(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_convolution": torch.backends.cudnn.allow_tf32,
        }
    return facts
