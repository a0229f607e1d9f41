"""What tells the time, and what is recorded about the machine that it was told on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


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
    """Time between two events on the current stream of an NVIDIA device."""

    name = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Callable[[], object]) -> float:
        """Run `call` on an idle device and return the ms between the events around it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Everything about this process that a latency depends on, JSON-able.

    Args:
        device: where the models run.

    Returns:
        Device, clock, threads, versions and, on a GPU, TF32, cuDNN and the state of :func:`gpu_state`.
    """
    facts: dict[str, Any] = {
        "device": str(device),
        "device_name": device_name(device),
        "clock": clock_for(device).name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        facts |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_convolution": torch.backends.cudnn.allow_tf32,
        }
    return facts


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Read, never set, the clocks, temperature, power and throttle reasons of a GPU.

    Args:
        device: an NVIDIA device.

    Returns:
        MHz, degrees Celsius, watts and the bit mask of throttle reasons (bit 0, idle, removed); None for
        another kind of device, without the optional package `nvidia-ml-py`, or where the driver refuses to
        tell.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & ~1,
        }
    except Exception:  # a reading that some drivers, containers and virtual GPUs do not give
        return None
