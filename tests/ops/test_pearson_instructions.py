"""The compiled loss on the CPU under each instruction set that its loops are compiled for."""

import os
from dataclasses import replace

import pytest
import torch

from jdkd import _ext
from tests.ops.pearson_cases import CASES, DTYPES, Case, check, like, variants
from tests.ranks import started

CAPABILITIES = ("default", "avx2", "avx512")
WIDE = Case(shapes=((1, 35, 9, 5), (2, 16, 23, 31)), mean=3.0, r=0.8)  # 35 channels: whole vectors, and a part of one
MIXED = [replace(WIDE, dtype=of, teacher_dtype=by) for of in DTYPES for by in DTYPES if of != by]
NAMED = [CASES[name] for name in ("large_mean", "almost_equal_and_large_mean", "outlier", "one_element_and_1x1")]


def _held_to_the_rule(rank: int, folder: str) -> None:
    os.environ["ATEN_CPU_CAPABILITY"] = CAPABILITIES[rank]  # before the operator is first called
    for case in (WIDE, *NAMED):
        for variant in variants():
            check(like(case, variant), tap=case is WIDE)
    for case in MIXED:
        check(case)
        check(replace(case, channels_last=True))
    students, teachers = WIDE.levels()
    sums = torch.ops.jdkd_C.pearson_fwd(students, teachers, [1.0, 1.0], 1e-6, False)[3]
    torch.save(sums, f"{folder}/{CAPABILITIES[rank]}.pt")


@pytest.mark.skipif(_ext.library() is None, reason="the extension is not built")
def test_every_instruction_set_is_held_to_the_2x_rule(tmp_path):
    started(_held_to_the_rule, str(tmp_path), count=len(CAPABILITIES))
    sums = [torch.load(tmp_path / f"{name}.pt") for name in CAPABILITIES]
    here = torch.backends.cpu.get_cpu_capability().lower()
    ran = CAPABILITIES[: 1 + CAPABILITIES.index(here)] if here in CAPABILITIES else CAPABILITIES[:1]
    last_bits = {tuple(each.flatten().tolist()) for each in sums[: len(ran)]}
    assert len(last_bits) == len(ran), "as each adds up in an order of its own"
