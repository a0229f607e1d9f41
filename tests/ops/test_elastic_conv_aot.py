"""The elastic convolution compiled for sm_90 ahead of time, without a GPU."""

import json

import pytest

from tests.without_interpreter import printed_by

SHARED_BYTES = 232_448  # of one block on sm_90; the compiler does not check it


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return json.loads(printed_by("tests.ops.elastic_conv_aot"))


def test_every_configuration_fits_the_chip_and_spills_nothing(compiled):
    assert len(compiled) == 24
    for case in compiled:
        assert case["shared_bytes"] <= SHARED_BYTES, case
        assert case["local_accesses"] == 0, case


def test_low_precision_and_tf32_use_the_matrix_unit(compiled):
    for case in compiled:
        assert (case["matrix_instructions"] > 0) == (case["precision"] == "tf32"), case


def test_leading_channels_last_inputs_are_copied_sixteen_bytes_at_a_time(compiled):
    for case in compiled:
        if case["channels_last"] and not case["listed"]:
            assert (case["wide_copies"] > 0) == case["wide"], case


def test_no_configuration_runs_eight_warps_or_one_flattened_loop(compiled):
    for case in compiled:
        assert case["warps"] == 4, case
        assert case["loops"] == [3], case


def test_every_offset_is_wide(compiled):
    assert all(case["narrow_offsets"] == [] for case in compiled)
