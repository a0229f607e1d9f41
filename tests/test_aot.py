"""What the compilers make of the kernels for sm_90, without a GPU: registers, memory, widths of loads."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from jdkd import _ext

MODULES = ["jdkd.kernels.pearson"]  # each lists its variants in aot_variants()


@pytest.fixture(scope="module", params=MODULES)
def variants(request) -> list[dict]:
    aot = pytest.importorskip("tests.aot", exc_type=ImportError)
    return [json.loads(line) for line in aot.without_interpreter("tests.aot", request.param).splitlines()]


def test_every_triton_variant_stays_in_registers_and_shared_memory(variants):
    assert variants
    for variant in variants:
        assert variant["stack_bytes"] == 0 and variant["local_accesses"] == 0, variant
        assert variant["shared_bytes"] <= 232_448, variant  # of one block on sm_90; Triton does not check it


def test_features_move_sixteen_bytes_at_a_time(variants):
    wide = [variant for variant in variants if variant["wide"]]
    assert wide
    for variant in wide:
        read, planes = variant["features"], "plane" in variant["name"]
        assert variant["wide_loads"] >= read, variant
        assert variant["loads_of_halves"] <= read * planes, variant  # the edge of a chunk of a plane
        if "grad" in variant["name"]:
            assert variant["wide_stores"] >= 1, variant
            assert variant["stores_of_halves"] <= planes, variant


def test_every_kind_of_launch_has_a_variant(variants):
    names = {variant["name"] for variant in variants}
    for dtype in ("fp32", "bf16", "fp16"):
        for levels in (1, 5):
            for what in ("", " with dout"):
                for kernel in ("plane", "row"):
                    name = f"_pearson_{kernel}_grad_kernel {dtype} x{levels}{what}"
                    assert {name, f"{name} unaligned"} <= names


def test_no_kernel_waits_for_another_through_an_atomic(variants):
    assert all(variant["atomics"] == 0 for variant in variants)


def _cuobjdump(*options: str) -> str:
    extension = _ext.module()
    if extension is None:
        pytest.skip(_ext.why_missing())
    if not _ext.build_info()["cuda_ops"]:
        pytest.skip("jdkd._C was built without CUDA code")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, *options, extension.__file__], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_extension_contains_sm_90_code():
    assert re.search(r"\bsm_90a?\b", _cuobjdump("-lelf"))


def test_no_cuda_kernel_of_the_extension_spills():
    text = _cuobjdump("-res-usage")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert any("pearson" in name for name, *_ in kernels)
    for name, registers, stack, shared, local in kernels:
        assert int(stack) == 0 and int(local) == 0, name
        assert int(registers) <= 128 and int(shared) <= 48 * 1024, name
