"""Compiles the elastic convolution of levels for sm_90 without a GPU and prints what became of it, one JSON a line.

Run in a process of its own: under ``TRITON_INTERPRET`` a kernel cannot be compiled.
"""

import re

import triton
import triton.language as tl

from jdkd.kernels import elastic_levels
from tests.aot import counts, memory, report
from tests.tap_loops import loops_around_products


@triton.jit
def _flattened_kernel(x_ptr, y_ptr, kernel_h, kernel_w, in_channels, BLOCK: tl.constexpr):
    """What is never shipped: one loop over taps and channels, told apart by division."""
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    pieces = tl.cdiv(in_channels, BLOCK)
    for i in range(kernel_h * kernel_w * pieces):
        at = i // pieces * in_channels + i % pieces * BLOCK
        a = tl.load(x_ptr + at + k[:, None] * in_channels + k[None, :])
        total = tl.dot(a, a.T, total)
    tl.store(y_ptr + k[:, None] * BLOCK + k[None, :], total)


def planted() -> dict:
    """The flattened loop as a variant, for the net that must catch it."""
    kernel = _flattened_kernel
    types = {"x_ptr": "*bf16", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    shipped = elastic_levels.aot_variants()[0]
    return shipped | {
        "name": "planted",
        "kernel": kernel,
        "signature": {name: types.get(name, "i32") for name in kernel.arg_names},
        "constants": {"BLOCK": 64},
        "aligned": ("x_ptr", "y_ptr"),
    }


COUNTED = {
    "local_accesses": r"\b(?:LDL|STL)\b",
    "matrix_instructions": r"\bHGMMA\b",
    "tma_loads": r"\bUTMALDG\b",
    "wide_copies": r"\bLDGSTS\.E[\w.]*\.128\b",
    "copies": r"\bLDGSTS\b",
    "wide_stores": r"\bSTG\.E[\w.]*\.128\b",
    "stores": r"\bSTG\b",
    "atomics": r"\b(?:ATOM|ATOMG|RED)\b",
}


def inspected(variant: dict, kernel, text: str) -> dict:
    """Registers, local and shared memory, loops and the instructions that matter of one variant."""
    told = {key: variant[key] for key in ("name", "matrix", "tma", "wide", "wide_y")}
    built = {
        "warps": kernel.metadata.num_warps,
        "threads": [int(n) for n in re.findall(r"\.reqntid (\d+)", kernel.asm["ptx"])],
        "loops": {stage: loops_around_products(kernel.asm[stage]) for stage in ("ttir", "ttgir")},
    }
    return told | memory(kernel) | built | counts(COUNTED, text)


if __name__ == "__main__":
    report([*elastic_levels.aot_variants(), planted()], inspected)
