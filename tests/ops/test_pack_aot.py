"""The kernels that pack weights, compiled for sm_90 ahead of time, without a GPU."""

from __future__ import annotations

import json
import re

import pytest

from jdkd import _ext
from tests import machine_code
from tests.scheduled_code import decoded, loops, most_in_flight
from tests.without_interpreter import printed_by

SHARED_BYTES = 232_448  # of one block on sm_90; Triton does not check it


@pytest.fixture(scope="module")
def variants() -> list[dict]:
    return [json.loads(line) for line in printed_by("tests.aot", "jdkd.kernels.pack").splitlines()]


def test_triton_variants_stay_in_registers_and_shared_memory(variants):
    assert len(variants) == 30
    for variant in variants:
        assert variant["stack_bytes"] == 0 and variant["local_accesses"] == 0, variant
        assert 0 < variant["shared_bytes"] <= SHARED_BYTES, variant  # some: the turn goes through it


def test_triton_variants_move_sixteen_bytes_at_a_time_where_all_is_aligned(variants):
    for variant in variants:
        assert (variant["wide_loads"] > 0) == (variant["wide_stores"] > 0) == variant["wide"], variant


def test_triton_offsets_are_wide(variants):
    assert all(variant["narrow_offsets"] == [] for variant in variants)


@pytest.fixture(scope="module")
def kernels() -> list[tuple[str, str]]:
    """Architecture and name of the compiled kernels."""
    if _ext.library() is None or "pack" not in _ext.build_info()["cuda_ops"]:
        pytest.skip(_ext.why_missing("pack", "cuda") or "not compiled")
    return [kernel for kernel in machine_code.kernels_of_extension() if "pack_kernel" in kernel[1]]


def test_compiled_kernels_spill_nothing_and_fit_eight_blocks_of_a_kind(kernels):
    architectures = {architecture for architecture, _ in kernels}
    assert len(kernels) == 27 * len(architectures) > 0  # three actions, three dtypes on either side
    for kernel in kernels:
        used = machine_code.resources_of_extension()[kernel]
        assert used["STACK"] == 0 and used["LOCAL"] == 0, kernel
        assert not re.search(r"\b(?:LDL|STL)\b", machine_code.kernels_of_extension()[kernel]), kernel
        assert used["REG"] <= 64 and used["SHARED"] <= 24 * 1024, kernel


def test_compiled_kernels_move_sixteen_bytes_at_a_time(kernels):
    for kernel in kernels:
        text = machine_code.kernels_of_extension()[kernel]
        assert re.search(r"\bLDG\.E[\w.]*\.128\b", text) and re.search(r"\bSTG\.E[\w.]*\.128\b", text), kernel


def test_compiled_kernels_ask_for_all_vectors_of_a_thread_before_they_wait_for_one(kernels):
    """Of the copy's loop: four of float32, which eight elements are two of, or two; the sum reads both sides."""
    for kernel in kernels:
        if kernel[0] == "sm_90a":
            action, shared, packed = re.search(r"ActionE(\d)E(f|6__half|13__nv_bfloat16)(.*?)EEv", kernel[1]).groups()
            wide = {"0": shared == "f", "1": True, "2": packed == "f"}[action]  # pack, add, set
            code = loops(decoded(machine_code.kernels_of_extension()[kernel]))
            found = max(most_in_flight(loop, r"\bLDG\.E\.128\b") for loop in code)
            assert found == 4 * wide + 2 * (not wide) + (action == "1" and (shared == "f") != (packed == "f")), kernel
