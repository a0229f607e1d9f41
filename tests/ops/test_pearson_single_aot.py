"""What the compiler made of the single pass for sm_90a, read from jdkd._C without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from jdkd import _ext
from tests import machine_code
from tests.scheduled_code import decoded, loops, most_in_flight, unawaited

KERNEL = re.compile(r"pearson_single_kernelI(f|13__nv_bfloat16)Li(\d)E")
REGISTERS, THREADS = 65_536, 256  # of an SM; of a block where three of them share an SM


def by_variant(of_extension: Callable[[], dict]) -> dict:
    """What is known of each variant for sm_90a: (element, elements a vector)."""
    if _ext.library() is None or "pearson_single" not in _ext.build_info()["cuda_ops"]:
        pytest.skip("jdkd._C was built without CUDA code")
    found = {}
    for (architecture, name), known in of_extension().items():
        if (match := KERNEL.search(name)) and architecture == "sm_90a":
            found["float" if match[1] == "f" else "bfloat16", int(match[2])] = known
    return found


@pytest.fixture(scope="module")
def code() -> dict[tuple[str, int], str]:
    return by_variant(machine_code.kernels_of_extension)


ALIGNED = [("float", 4), ("bfloat16", 8)]
VARIANTS = [*ALIGNED, ("float", 1), ("bfloat16", 1)]


def test_nothing_spills_and_three_blocks_share_the_registers_of_an_sm():
    usage = by_variant(machine_code.resources_of_extension)
    assert set(usage) == set(VARIANTS)
    for variant in VARIANTS:
        resources = usage[variant]
        assert resources["STACK"] == 0 and resources["LOCAL"] == 0, variant
        assert -(-resources["REG"] // 8) * 8 * THREADS * 3 <= REGISTERS, variant


@pytest.mark.parametrize("variant", ALIGNED, ids=str)
def test_features_arrive_by_bulk_copies_on_barriers(code, variant):
    assert len(re.findall(r"\bUBLKCP\b", code[variant])) >= 2  # student and teacher
    assert re.search(r"\bSYNCS\.PHASECHK\.TRANS64\.TRYWAIT\b", code[variant])
    # All that is read from global memory otherwise is the end of a tensor, and the moments of other blocks.
    wide = re.findall(r"\bLDG?\.E[\w.]*\.128\b", code[variant])
    assert not wide


@pytest.mark.parametrize("variant", ALIGNED, ids=str)
def test_a_block_asks_for_its_first_copy_after_one_reciprocal(code, variant):
    instructions = decoded(code[variant])
    first = next(i for i, one in enumerate(instructions) if "UBLKCP" in one.text)
    assert first <= 380
    assert sum("MUFU.RCP" in one.text for one in instructions[:first]) == 1


@pytest.mark.parametrize("variant", ALIGNED, ids=str)
def test_sweeps_read_and_write_sixteen_bytes_at_a_time(code, variant):
    assert len(re.findall(r"\bLDS\.128\b", code[variant])) >= 6  # both tensors, three sweeps
    assert re.search(r"\bSTG\.E\.EF\.128\b", code[variant])  # evicted first: nobody reads it soon


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_blocks_of_a_cluster_wait_for_each_other_once_and_part_without_a_fence(code, variant):
    assert len(re.findall(r"\bUCGABAR_ARV\b", code[variant])) == 2
    assert len(re.findall(r"\bUCGABAR_WAIT\b", code[variant])) == 2
    assert len(re.findall(r"\bMEMBAR\.ALL\.GPU\b", code[variant])) == 1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_moments_of_other_blocks_have_arrived_before_a_block_says_that_it_read_them(code, variant):
    instructions, remote = decoded(code[variant]), r"\bLD\.E\b"
    relaxed = max(i for i, one in enumerate(instructions) if "UCGABAR_ARV" in one.text)
    before, after = instructions[:relaxed], instructions[relaxed:]
    assert sum(re.search(remote, one.text) is not None for one in before) == 6  # of Moments
    assert not unawaited(before, remote)
    assert not any(re.search(remote, one.text) for one in after)


@pytest.mark.parametrize(("variant", "most"), [(ALIGNED[0], 21), (ALIGNED[1], 22)], ids=str)
def test_centred_sums_and_gradient_of_whole_vectors_take_so_many_instructions_a_pair(code, variant, most):
    sweeps = [loop for loop in loops(decoded(code[variant])) if sum("LDS.128" in one.text for one in loop) == 2]
    assert len(sweeps) == 4  # of whole vectors, and of the ends of rows
    assert sum(sorted(len(sweep) for sweep in sweeps)[:2]) <= most * variant[1]


def test_the_sum_has_eight_parts_of_a_level_in_flight():
    if _ext.library() is None or "pearson_single" not in _ext.build_info()["cuda_ops"]:
        pytest.skip("jdkd._C was built without CUDA code")
    kernels = machine_code.kernels_of_extension()
    (code,) = [text for (arch, name), text in kernels.items() if arch == "sm_90a" and "pearson_single_sum" in name]
    assert most_in_flight(decoded(code), r"\bLDG\.E\.64\.CONSTANT\b") == 8
