"""What the machine is: versions, the extension, the largest cluster, clocks, and the bandwidth of a copy."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from benchmarks import harness, prebuilt, record
from benchmarks.gpu.check import NO_EXTENSION
from benchmarks.gpu.jobs import tell
from jdkd import _ext

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks_throttle_reasons.active,temperature.gpu,power.draw"


def extension(device: str) -> tuple[str, bool]:
    """What the extension is, and whether it has the kernels of a device."""
    info = _ext.build_info()
    if info is None:
        return _ext.why_missing() or "missing", False
    torch_too = "" if info["torch"] == torch.__version__ else f", built with torch {info['torch']}"
    kernels = info[f"{device}_ops"]
    return f"{', '.join(kernels) or 'no kernels'} for {' '.join(info['arch_list']) or 'no GPU'}{torch_too}", bool(kernels)


def facts(device: str) -> tuple[dict[str, object], bool]:
    """What is to be known of the machine, and whether the extension serves."""
    text, fits = extension(device)
    found: dict[str, object] = {
        "device": record.device_name(device),
        "python": platform.python_version(),
        "sources": record.sources_hash(),
        "csrc": prebuilt.sources(),
        "commit": record.commit(),
        "extension": text,
        **{name: value for name, value in record.environment(device, 0.0).items() if name in ("driver", "torch", "cuda", "triton")},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "L2 MB": round(properties.L2_cache_size / 1e6),
            f"nvidia-smi {CLOCKS}": record.command("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"),
        }
        if fits:
            *_, found["largest_cluster"] = torch.ops.jdkd_C.pearson_single_chip(0)
    found["copy GB/s, random bytes"] = round(harness.copy_bandwidth(device) / 1e9, 1)
    return found, fits


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        tell(failed="machine", why=f"torch {torch.__version__} sees no CUDA device")
        return 1
    found, fits = facts(given.device)
    tell(machine=found)
    for name, value in found.items():
        print(f"{name}: {value}")
    return 0 if fits else NO_EXTENSION


if __name__ == "__main__":
    sys.exit(main())
