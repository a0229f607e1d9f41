"""The kernels that pack weights, compiled for sm_90 ahead of time, without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from jdkd import _ext

SHARED_BYTES = 232_448  # of one block on sm_90; Triton does not check it


@pytest.fixture(scope="module")
def variants() -> list[dict]:
    aot = pytest.importorskip("tests.aot", exc_type=ImportError)
    return [json.loads(line) for line in aot.without_interpreter("tests.aot", "jdkd.kernels.pack").splitlines()]


def test_triton_variants_stay_in_registers_and_shared_memory(variants):
    assert len(variants) == 30
    for variant in variants:
        assert variant["stack_bytes"] == 0 and variant["local_accesses"] == 0, variant
        assert 0 < variant["shared_bytes"] <= SHARED_BYTES, variant  # some: the turn goes through it


def test_triton_variants_move_sixteen_bytes_at_a_time_where_all_is_aligned(variants):
    for variant in variants:
        assert (variant["wide_loads"] > 0) == (variant["wide_stores"] > 0) == variant["wide"], variant


@pytest.fixture(scope="module")
def machine_code() -> dict[str, str]:
    """The machine code and resources of the compiled kernels by name."""
    extension = _ext.module()
    if extension is None or "pack" not in _ext.build_info()["cuda_ops"]:
        pytest.skip(_ext.why_missing("pack", "cuda") or "not compiled")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found: dict[str, str] = {}
    for option in ("-sass", "-res-usage"):
        run = subprocess.run([tool, option, extension.__file__], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        for name, text in re.findall(
            r"Function\s*:?\s*(\S*pack_kernel[^\s:]*):?\s(.*?)(?=Function|\Z)", run.stdout, re.S
        ):
            key = re.sub(r"^.*?(pack_kernel)", r"\1", name)
            found[key] = found.get(key, "") + text
    return found


def test_compiled_kernels_spill_nothing_and_fit_eight_blocks_of_a_kind(machine_code):
    assert len(machine_code) == 27  # three actions, three dtypes on either side
    for name, text in machine_code.items():
        registers, stack, shared, local = re.search(
            r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text
        ).groups()  # fmt: skip
        assert int(stack) == 0 and int(local) == 0 and not re.search(r"\b(?:LDL|STL)\b", text), name
        assert int(registers) <= 64 and int(shared) <= 24 * 1024, name


def test_compiled_kernels_move_sixteen_bytes_at_a_time(machine_code):
    for name, text in machine_code.items():
        assert re.search(r"\bLDG\.E[\w.]*\.128\b", text) and re.search(r"\bSTG\.E[\w.]*\.128\b", text), name
