"""The elastic convolution of levels compiled for sm_90 ahead of time, without a GPU."""

import json

import pytest

from tests.without_interpreter import printed_by

SHARED_BYTES = 232_448  # of one block on sm_90; the compiler does not check it


@pytest.fixture(scope="module")
def printed() -> list[dict]:
    return [json.loads(line) for line in printed_by("tests.ops.elastic_levels_aot").splitlines()]


@pytest.fixture(scope="module")
def variants(printed) -> list[dict]:
    return printed[:-1]


def test_every_variant_stays_in_registers_and_shared_memory(variants):
    assert len(variants) == 25
    for variant in variants:
        assert variant["stack_bytes"] == 0 and variant["local_accesses"] == 0, variant
        assert variant["shared_bytes"] <= SHARED_BYTES, variant


def test_two_blocks_of_the_largest_tile_fit_on_a_multiprocessor(variants):
    for variant in variants:
        assert 2 * variant["shared_bytes"] <= SHARED_BYTES and 2 * 128 * variant["registers"] <= 65536, variant


def test_low_precision_and_tf32_use_the_matrix_unit(variants):
    for variant in variants:
        assert (variant["matrix_instructions"] > 0) == variant["matrix"], variant


def test_the_shared_weight_comes_through_the_tensor_memory_accelerator(variants):
    assert sum(variant["tma"] for variant in variants) >= 15
    for variant in variants:
        assert (variant["tma_loads"] > 0) == variant["tma"], variant


def test_images_move_sixteen_bytes_at_a_time(variants):
    for variant in variants:
        if variant["wide"]:
            assert variant["wide_copies"] == variant["copies"] > 0, variant
        if variant["wide_y"]:
            assert variant["wide_stores"] == variant["stores"] > 0, variant


def test_no_variant_runs_eight_warps_or_one_flattened_loop(printed, variants):
    for variant in variants:
        assert variant["warps"] == 4 and variant["threads"] == [128], variant
        # Rows, columns and channels around every product, before the compiler pipelines them and after.
        assert all(loops and set(loops) == {3} for loops in variant["loops"].values()), variant
        assert variant["atomics"] == 0, variant
    assert printed[-1]["name"] == "planted" and printed[-1]["loops"]["ttgir"] == [1]


def test_every_offset_is_wide_and_a_planted_one_is_caught(printed, variants):
    assert all(variant["narrow_offsets"] == [] for variant in variants)
    assert len(printed[-1]["narrow_offsets"]) == 1
