"""Compiles the elastic 1x1 convolution for sm_90 without a GPU and prints what became of it, one JSON object a line.

Run in a process of its own: under ``TRITON_INTERPRET`` a kernel cannot be compiled.
"""

import itertools

from jdkd.kernels import elastic_pointwise, elastic_pointwise_grad
from tests.aot import counts, memory, report

COUNTED = {
    "local_accesses": r"\b(?:LDL|STL)\b",
    "matrix_instructions": r"\bHGMMA\b",
    "tma_loads": r"\bUTMALDG\b",
    "wide_copies": r"\bLDGSTS\.E[\w.]*\.128\b",
    "wide_stores": r"\bSTG\.E[\w.]*\.128\b",
    "stores": r"\bSTG\b",
    "atomics": r"\b(?:ATOM|ATOMG|RED)\b",
}


def inspected(variant: dict, kernel, text: str) -> dict:
    """Registers, local and shared memory and the instructions that matter of one variant."""
    told = {key: variant[key] for key in ("name", "matrix", "tma", "wide")}
    return told | memory(kernel) | {"warps": kernel.metadata.num_warps} | counts(COUNTED, text)


if __name__ == "__main__":
    modules = (elastic_pointwise, elastic_pointwise_grad)
    report(itertools.chain.from_iterable(module.aot_variants() for module in modules), inspected)
