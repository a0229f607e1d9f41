"""Compiles Triton kernels for sm_90 without a GPU and prints what became of them, one JSON object a line.

    python -m tests.aot jdkd.kernels.pearson

The module lists its variants in ``aot_variants()``, see there. Run in a process of its own: under ``TRITON_INTERPRET``
a kernel cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.machine_code import instructions, resources
from tests.narrow_offsets import narrow_offsets
from tests.scheduled_code import decoded, loops, most_in_flight

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


def report(variants: Iterable[dict], inspected: Callable) -> None:
    """Compiles all variants and prints what ``inspected(variant, kernel, instructions)`` says of each, a line each."""
    variants = list(variants)
    kernels = [compiled(variant) for variant in variants]
    texts = instructions([kernel.asm["cubin"] for kernel in kernels])
    for variant, kernel, text in zip(variants, kernels, texts, strict=True):
        offsets = {"narrow_offsets": narrow_offsets(kernel.asm["ttir"])}
        print(json.dumps(inspected(variant, kernel, text) | offsets), flush=True)


def memory(kernel) -> dict[str, int]:
    """Where a kernel keeps what it works on: registers, bytes of stack and of shared memory."""
    usage = resources(kernel.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
    }


def counts(patterns: dict[str, str], text: str) -> dict[str, int]:
    """How often each pattern occurs."""
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


COUNTED = {
    "local_accesses": r"\b(?:LDL|STL)\b",
    "wide_loads": r"\bLDG\.E[\w.]*\.128\b",
    "wide_stores": r"\bSTG\.E[\w.]*\.128\b",
    "loads_of_halves": r"\bLDG\.E[\w.]*\.U16\b",
    "stores_of_halves": r"\bSTG\.E[\w.]*\.U16\b",
    "atomics": r"\b(?:ATOM|ATOMG|RED)\b",
}


def inspected(variant: dict, kernel, text: str) -> dict:
    """Counts of the instructions that matter, and the resources, of one variant; of its innermost loops the
    instructions, the wide loads among them, and how many of these are under way."""
    told = {key: variant[key] for key in ("name", "features", "wide")} | memory(kernel) | counts(COUNTED, text)
    wide = COUNTED["wide_loads"]
    found = [(len(loop), sum(re.search(wide, one.text) is not None for one in loop), most_in_flight(loop, wide))
             for loop in loops(decoded(text))]  # fmt: skip
    return told | {"loops": found}


if __name__ == "__main__":
    report(importlib.import_module(sys.argv[1]).aot_variants(), inspected)
