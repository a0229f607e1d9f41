"""What the compilers make of the kernels for sm_90, without a GPU: registers, memory, widths of loads."""

from __future__ import annotations

import json
import re

import pytest

from jdkd import _ext
from tests import machine_code
from tests.scheduled_code import decoded, loops, most_in_flight
from tests.without_interpreter import printed_by

MODULES = ["jdkd.kernels.pearson"]  # each lists its variants in aot_variants()
PEARSON = r"\S*pearson_(plane|row)_(stats|grad)_kernel"


@pytest.fixture(scope="module", params=MODULES)
def variants(request) -> list[dict]:
    return [json.loads(line) for line in printed_by("tests.aot", request.param).splitlines()]


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


def test_loops_have_loads_in_flight_and_take_so_many_instructions_a_pair(variants):
    wide = [variant for variant in variants if variant["wide"]]
    assert wide
    for variant in wide:
        ((instructions, loads, in_flight),) = variant["loops"]
        pairs = loads // variant["features"] * (4 if "fp32" in variant["name"] else 8)
        is_statistics = "stats" in variant["name"]
        assert instructions <= (18 if is_statistics else 14) * pairs, variant
        assert in_flight >= (4 if is_statistics and "plane" in variant["name"] else 2), variant


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


def test_every_triton_offset_is_wide(variants):
    assert all(variant["narrow_offsets"] == [] for variant in variants)


def test_the_extension_holds_machine_code_for_what_it_was_built_for():
    elves = machine_code.of_extension("--list-elf")
    for architecture in _ext.build_info()["arch_list"]:
        major, minor = re.match(r"(\d+)\.(\d+)", architecture).groups()
        assert f"sm_{major}{minor}" in elves
    assert re.search(r"\bsm_90a?\b", elves)


def test_no_cuda_kernel_of_the_extension_spills():
    usage = machine_code.resources_of_extension()
    assert any("pearson" in name for _, name in usage)
    for kernel, used in usage.items():
        assert used["STACK"] == 0 and used["LOCAL"] == 0, kernel
        assert used["REG"] <= 128 and used["SHARED"] <= 48 * 1024, kernel


def test_cuda_kernels_of_the_loss_move_sixteen_bytes_at_a_time():
    kernels = machine_code.kernels_of_extension()
    found = {kernel: text for kernel, text in kernels.items() if re.match(PEARSON, kernel[1])}
    assert found
    for kernel, text in found.items():
        assert len(re.findall(r"\bLDG\.E\.128", text)) >= 4, kernel
        if "grad" in kernel[1]:
            assert len(re.findall(r"\bSTG\.E\.128", text)) >= 2, kernel
        assert not re.search(r"\b(?:LDL|STL|RED|ATOM|ATOMG)\b", text), kernel


def of_hopper(kind: str) -> dict[str, list]:
    """The scheduled code of the split form's kernels of a kind for sm_90a, by name."""
    kernels = machine_code.kernels_of_extension()
    found = {
        name: decoded(text)
        for (architecture, name), text in kernels.items()
        if architecture == "sm_90a" and re.match(rf"\S*pearson_{kind}_kernel", name)
    }
    assert found
    return found


@pytest.mark.parametrize(("kind", "count"), [("plane", 2), ("row", 1)])  # planes: of a block and of a warp
def test_statistics_have_eight_loads_in_flight_and_take_fourteen_instructions_a_pair(kind, count):
    for name, instructions in of_hopper(f"{kind}_stats").items():
        pairs = 16 if "kernelIf" in name else 32  # four packs of a thread
        wide = [loop for loop in loops(instructions) if most_in_flight(loop, r"\bLDG\.E\.128\b") >= 8]
        assert len(wide) == count, name
        assert all(len(loop) <= 14 * pairs for loop in wide), name


def test_gradients_ask_for_features_before_they_wait_for_the_table():
    for name, instructions in of_hopper("(?:plane|row)_grad").items():
        columns = 1 if "plane" in name else 4 if "kernelIf" in name else 8
        found = most_in_flight(instructions, r"\bLDG\.E(?:\.128)?\.CONSTANT\b")
        assert found >= 5 * columns + 6, name  # two packs of x, y and dout


def test_gradients_take_so_many_instructions_a_pair():
    for kind, count, (most_fp32, most_half) in (("plane", 2, (12, 15)), ("row", 1, (17, 17))):
        for name, instructions in of_hopper(f"{kind}_grad").items():
            pairs, most = (8, most_fp32) if "kernelIf" in name else (16, most_half)  # two packs of a thread
            wide = [loop for loop in loops(instructions) if most_in_flight(loop, r"\bLDG\.E\.128\b") >= 6]
            assert len(wide) == count, name  # of a block and of a warp
            assert all(len(loop) <= most * pairs for loop in wide), name


def test_blocks_of_the_finish_count_themselves_between_fences_and_the_last_has_eight_loads_in_flight():
    (instructions,) = of_hopper("finish").values()
    texts = [instruction.text for instruction in instructions]

    def places(pattern: str) -> list[int]:
        return [i for i, text in enumerate(texts) if re.search(pattern, text)]

    (count,), (before, after) = places(r"\bATOMG?\b"), places(r"\bMEMBAR\S*\.GPU\b")
    assert places(r"\bBAR\.SYNC\b")[0] < before < count < after < places(r"\bBAR\.SYNC\b")[1]
    assert max(places(r"\bLDG\S*\.CONSTANT\b")) < before  # what other blocks wrote is read past the first cache
    assert most_in_flight(instructions[after:], r"\bLDG\.E\.64\.STRONG\.GPU\b") == 8
