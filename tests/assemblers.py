"""Puts the PTX of every Triton kernel through another assembler than Triton's, and prints what both made of it.

    python -m tests.assemblers PTXAS [MODULE ...]

One JSON object a variant and line. Wrong machine code for Hopper is known of assemblers before 13.1, the one that
Triton 3.6 ships included; where a kernel's numbers are wrong, TRITON_PTXAS_PATH names another to Triton. Run in a
process of its own: under ``TRITON_INTERPRET`` a kernel cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.aot import compiled, memory
from tests.machine_code import nvidia_package
from tests.ops.elastic_conv_aot import compile_for_sm90, configurations

MODULES = ("pearson", "pack", "elastic_levels", "elastic_pointwise", "elastic_pointwise_grad", "elastic_conv")


def release(ptxas: str | Path) -> tuple[int, int]:
    """The version of an assembler."""
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()
    return int(major), int(minor)


def newest_assembler() -> str | None:
    """The newest ``ptxas`` there is: what JDKD_PTXAS names, of PATH, or of the package nvidia-cuda-nvcc."""
    places = [os.environ.get("JDKD_PTXAS"), shutil.which("ptxas"), *nvidia_package("cu13/bin/ptxas")]
    return max((str(place) for place in places if place and os.access(place, os.X_OK)), key=release, default=None)


def assembled(ptx: str, ptxas: str) -> dict[str, int]:
    """Registers, and bytes of stack and of spills, of the kernel that an assembler makes of PTX."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-lineinfo", "-v", f"--gpu-name={target}", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr
    stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "stack_bytes": int(stack),
        "spill_bytes": int(stores) + int(loads),
    }


def kernels(modules: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    """Name and kernel of every variant."""
    for module in modules:
        if module == "elastic_conv":
            for case in configurations():
                yield f"{module} {case}", compile_for_sm90(case)
        else:
            for variant in importlib.import_module(f"jdkd.kernels.{module}").aot_variants():
                yield variant["name"], compiled(variant)


if __name__ == "__main__":
    for name, kernel in kernels(tuple(sys.argv[2:]) or MODULES):
        theirs = assembled(kernel.asm["ptx"], sys.argv[1])
        told = {"name": name, "warps": kernel.metadata.num_warps, "ours": memory(kernel), "theirs": theirs}
        print(json.dumps(told), flush=True)
