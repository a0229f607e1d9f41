"""Compiles Triton kernels for sm_90 without a GPU and prints what became of them, one JSON object a line.

    python -m tests.aot jdkd.kernels.pearson

The module lists its variants in ``aot_variants()``, see there. Run in a process of its own: under ``TRITON_INTERPRET``
a kernel cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)


def compiled(variant: dict):
    """The kernel as a launch with 16-byte aligned pointers would compile it."""
    aligned = {}
    for position, (name, kind) in enumerate(variant["signature"].items()):
        if name in variant["aligned"]:
            places = [(position, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(position,)]
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(
        fn=variant["kernel"], signature=variant["signature"], constexprs=variant["constants"], attrs=aligned
    )
    return triton.compile(source, target=TARGET, options=variant["options"])


def disassembled(kernel) -> str:
    """Machine code and resource usage of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = [TOOLS / "cuobjdump", "-sass", "-res-usage", file.name]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def without_interpreter(*module: str) -> str:
    """What ``python -m MODULE ...`` prints in a process of its own, where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *module]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    return run.stdout


def inspected(variant: dict) -> dict:
    """Counts of the instructions that matter, and the resources, of one variant."""
    kernel = compiled(variant)
    text = disassembled(kernel)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {
        "name": variant["name"],
        "features": variant["features"],
        "wide": variant["wide"],
        "registers": int(usage["REG"]),
        "stack_bytes": int(usage["STACK"]),
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "shared_bytes": kernel.metadata.shared,
        "wide_loads": len(re.findall(r"\bLDG\.E[\w.]*\.128\b", text)),
        "wide_stores": len(re.findall(r"\bSTG\.E[\w.]*\.128\b", text)),
        "loads_of_halves": len(re.findall(r"\bLDG\.E[\w.]*\.U16\b", text)),
        "stores_of_halves": len(re.findall(r"\bSTG\.E[\w.]*\.U16\b", text)),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", text)),
    }


if __name__ == "__main__":
    for variant in importlib.import_module(sys.argv[1]).aot_variants():
        print(json.dumps(inspected(variant)), flush=True)
