"""The elastic 1x1 convolution compiled for sm_90 ahead of time, without a GPU."""

import json

import pytest

from tests.without_interpreter import printed_by

SHARED_BYTES = 232_448  # of one block on sm_90; the compiler does not check it


@pytest.fixture(scope="module")
def variants() -> list[dict]:
    return [json.loads(line) for line in printed_by("tests.ops.elastic_pointwise_aot").splitlines()]


def test_every_variant_stays_in_registers_and_shared_memory(variants):
    assert len(variants) == 80
    for variant in variants:
        assert variant["stack_bytes"] == 0 and variant["local_accesses"] == 0, variant
        assert variant["shared_bytes"] <= SHARED_BYTES, variant


def test_low_precision_and_tf32_use_the_matrix_unit(variants):
    for variant in variants:
        assert (variant["matrix_instructions"] > 0) == variant["matrix"], variant


def test_the_shared_weight_comes_through_the_tensor_memory_accelerator(variants):
    assert sum(variant["tma"] for variant in variants) >= 40
    for variant in variants:
        assert (variant["tma_loads"] > 0) == variant["tma"], variant


def test_activations_move_sixteen_bytes_at_a_time(variants):
    wide = [variant for variant in variants if variant["wide"]]
    assert wide
    for variant in wide:
        statistics = 2 if "statistics" in variant["name"] else 0
        assert variant["wide_stores"] == variant["stores"] - statistics > 0, variant
        if "dw_kernel fp32 tf32" in variant["name"]:
            continue  # the matrix unit takes TF32 with its sums along rows only, so the copies transpose
        assert variant["wide_copies"] > 0, variant


def test_products_run_on_four_warps_and_nothing_is_atomic(variants):
    for variant in variants:
        assert variant["warps"] == 4 or "merge_kernel" in variant["name"], variant
        assert variant["atomics"] == 0, variant


def test_every_offset_is_wide(variants):
    assert all(variant["narrow_offsets"] == [] for variant in variants)
