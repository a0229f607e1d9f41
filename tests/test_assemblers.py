"""What another assembler than Triton's makes of the same kernels: no spills where there are none but in two variants,
and registers for one block less on a multiprocessor at most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.assemblers import newest_assembler, release
from tests.without_interpreter import printed_by

REGISTERS = 65_536  # of a multiprocessor
# Triton's 12.8 keeps these in registers; 13.5 spills 48 bytes a thread.
SPILLS_ELSEWHERE = ("_elastic_levels_fwd_kernel bf16 tf32 128x128x64 x5, odd Cout",
                    "_elastic_levels_fwd_kernel fp16 tf32 128x128x64 x5, odd Cout")  # fmt: skip


def blocks(registers: int, warps: int) -> int:
    """Blocks of a kernel that the registers of a multiprocessor hold."""
    return REGISTERS // (32 * warps * -(-registers // 8) * 8)


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
def test_a_newer_assembler_spills_in_two_variants_alone_and_fits_at_most_one_block_less():
    ptxas = newest_assembler()
    if ptxas is None or release(ptxas) < (13, 1):
        pytest.skip('needs ptxas 13.1 or newer: pip install --target FOLDER "nvidia-cuda-nvcc>=13.1", and name its '
                    "ptxas in JDKD_PTXAS")  # fmt: skip
    found = [json.loads(line) for line in printed_by("tests.assemblers", ptxas).splitlines()]
    assert len(found) > 250
    for kernel in found:
        ours, theirs = kernel["ours"], kernel["theirs"]
        if kernel["name"] not in SPILLS_ELSEWHERE:
            assert theirs["stack_bytes"] == theirs["spill_bytes"] == 0, kernel
        assert blocks(theirs["registers"], kernel["warps"]) >= blocks(ours["registers"], kernel["warps"]) - 1, kernel


def test_an_assembler_tells_what_it_made():
    from tests.assemblers import assembled

    ptxas = newest_assembler()
    if ptxas is None:
        pytest.skip("there is no ptxas")
    ptx = """.version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry nothing() {\n  ret;\n}\n"""
    found = assembled(ptx, ptxas)
    assert found["stack_bytes"] == found["spill_bytes"] == 0 < found["registers"] <= 32
    assert release(ptxas) >= (12, 0) and Path(ptxas).is_file()
