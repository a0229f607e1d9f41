"""What the machine is: versions, the extension, the largest cluster, clocks, and the bandwidth of a copy."""

from __future__ import annotations

import argparse
import functools
import platform
import runpy
import sys
from collections.abc import Iterator

import torch

from benchmarks import harness, record
from benchmarks.gpu.check import NO_DEVICE, NO_EXTENSION
from benchmarks.gpu.jobs import tell
from jdkd import _ext

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks_throttle_reasons.active,temperature.gpu,power.draw"


def extension(device: str) -> tuple[str, bool]:
    """What the extension is, and whether it is of the sources here and has the kernels of a device."""
    info = _ext.build_info()
    if info is None:
        return _ext.why_missing() or "missing", False
    kernels, here = info[f"{device}_ops"], sources()
    text = f"{', '.join(kernels) or 'no kernels'} for {' '.join(info['arch_list']) or 'no GPU'}"
    if info["torch"] != torch.__version__:
        text += f", built with torch {info['torch']}"
    if info["sources"] != here:
        text += f", of sources {info['sources']} where {here} are here"
    return text, bool(kernels) and info["sources"] == here


@functools.cache
def sources() -> str:
    """A hash of the C++ and CUDA sources of this checkout, made as a build makes it."""
    return runpy.run_path(str(record.ROOT / "setup.py"))["sources_hash"]()


def facts(device: str) -> Iterator[tuple[str, object]]:
    """What is to be known of the machine, the quickest first."""
    common = record.environment(device, 0.0)
    yield from ((name, common[name]) for name in ("device", "driver", "torch", "cuda", "triton", "sources", "commit"))
    yield "python", platform.python_version()
    yield "csrc", sources()
    text, fits = extension(device)
    yield "extension", text
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield "capability", f"{properties.major}.{properties.minor}"
        yield "multiprocessors", properties.multi_processor_count
        yield "L2 MB", round(properties.L2_cache_size / 1e6)
        yield CLOCKS, record.command("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
        if fits:
            yield "largest_cluster", torch.ops.jdkd_C.pearson_single_chip(0)[-1]
    yield "copy GB/s, random bytes", round(harness.copy_bandwidth(device) / 1e9, 1)
    if device == "cuda":
        yield f"{CLOCKS}, after", record.command("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        tell(failed="machine", why=f"torch {torch.__version__} sees no CUDA device")
        return NO_DEVICE
    for name, value in facts(given.device):
        tell(machine={name: value})
    return 0 if extension(given.device)[1] else NO_EXTENSION


if __name__ == "__main__":
    sys.exit(main())
