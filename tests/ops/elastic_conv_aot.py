"""Compiles the elastic convolution for sm_90 without a GPU and prints what the compiler made of it, as JSON.

Run in a process of its own: under ``TRITON_INTERPRET`` a kernel cannot be compiled.
"""

import itertools
import json
import re
import sys

import triton
from triton.compiler import ASTSource

from jdkd.kernels import elastic_conv as kernels
from tests.aot import TARGET
from tests.machine_code import instructions
from tests.narrow_offsets import narrow_offsets
from tests.tap_loops import loops_around_products

TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def configurations() -> list[dict]:
    """The largest tile of every kind of input, which needs most, all tiles of the common kind, and odd widths."""
    found = []
    kinds = [
        ("bf16", "bf16", "tf32"),
        ("bf16", "fp32", "tf32"),
        ("fp32", "fp32", "tf32"),
        ("fp32", "fp32", "ieee"),
    ]
    for x, weight, precision in kinds:
        for channels_last, listed in itertools.product((True, False), repeat=2):
            found.append(_case(x, weight, channels_last, listed, precision, positions=10_000_000))
    common = ("bf16", "bf16", True, False, "tf32")
    found += [_case(*common, positions=100), _case(*common, positions=100, out_channels=32)]
    found.append(_case("fp16", "fp16", True, False, "tf32", positions=10_000_000))
    found.append(_case("fp32", "fp32", False, False, "tf32", positions=100))
    for x, listed in itertools.product(("bf16", "fp32"), (True, False)):
        found.append(_case(x, x, True, listed, "tf32", positions=100, wide=False))
    return found


def _case(x, weight, channels_last, listed, precision, *, positions, out_channels=64, wide=True) -> dict:
    tile = kernels.tile(
        positions, out_channels, itemsize=max(TYPES[x], TYPES[weight]), channels_last=channels_last, listed=listed,
        ieee=precision == "ieee", wide=wide,
    )  # fmt: skip
    return {
        "x": x, "weight": weight, "channels_last": channels_last, "listed": listed, "precision": precision,
        "wide": wide, "tile": tile,
    }  # fmt: skip


def compile_for_sm90(case: dict):
    """Compiles one configuration as a launch with a bias would."""
    kernel = kernels._elastic_conv_fwd_kernel
    constants = dict.fromkeys(("X_LAST", "W_LAST", "Y_LAST"), case["channels_last"])
    constants |= dict(
        HAS_BIAS=True, RELU=True, IN_LISTED=case["listed"], OUT_LISTED=case["listed"], PRECISION=case["precision"],
        WIDE=case["wide"], V=16 // TYPES[case["x"]], DOT_IN_FP32=False, **case["tile"],
    )  # fmt: skip
    signature, attributes = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = case["weight"] if name in ("weight_ptr", "bias_ptr") else case["x"]
            signature[name] = "*i64" if name.endswith("index_ptr") else f"*{kind}"
            if name in ("x_ptr", "weight_ptr", "y_ptr"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernels.NUM_WARPS, "num_stages": kernels.NUM_STAGES}
    return triton.compile(source, target=TARGET, options=options)


def measured(case: dict, compiled, sass: str) -> dict:
    """Reads local memory, loops and instructions from the compiled kernel."""
    ptx = compiled.asm["ptx"]
    return case | {
        "warps": compiled.metadata.num_warps,
        "loops": sorted({*loops_around_products(compiled.asm["ttir"]), *loops_around_products(compiled.asm["ttgir"])}),
        "narrow_offsets": narrow_offsets(compiled.asm["ttir"]),
        "shared_bytes": compiled.metadata.shared,
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "matrix_instructions": len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
        "wide_copies": len(re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]+\], \[[^\]]+\], 0x10", ptx)),
    }


if __name__ == "__main__":
    cases = configurations()
    kernels = [compile_for_sm90(case) for case in cases]
    codes = instructions([kernel.asm["cubin"] for kernel in kernels])
    json.dump([measured(*each) for each in zip(cases, kernels, codes, strict=True)], sys.stdout)
