"""Compiles the elastic 1x1 convolution for sm_90 without a GPU and prints what became of it, one JSON object a line.

Run in a process of its own: under ``TRITON_INTERPRET`` a kernel cannot be compiled.
"""

import json
import re

from jdkd.kernels import elastic_pointwise, elastic_pointwise_grad
from tests.aot import compiled, disassembled


def inspected(variant: dict) -> dict:
    """Registers, local and shared memory and the instructions that matter of one variant."""
    kernel = compiled(variant)
    text = disassembled(kernel)
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    counted = {
        "local_accesses": r"\b(?:LDL|STL)\b",
        "matrix_instructions": r"\bHGMMA\b",
        "tma_loads": r"\bUTMALDG\b",
        "wide_copies": r"\bLDGSTS\.E[\w.]*\.128\b",
        "wide_stores": r"\bSTG\.E[\w.]*\.128\b",
        "stores": r"\bSTG\b",
        "atomics": r"\b(?:ATOM|ATOMG|RED)\b",
    }
    return {
        **{key: variant[key] for key in ("name", "matrix", "tma", "wide")},
        "registers": int(usage["REG"]),
        "stack_bytes": int(usage["STACK"]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        **{key: len(re.findall(pattern, text)) for key, pattern in counted.items()},
    }


if __name__ == "__main__":
    for module in (elastic_pointwise, elastic_pointwise_grad):
        for variant in module.aot_variants():
            print(json.dumps(inspected(variant)), flush=True)
