"""Machine code is decoded as it is encoded, and what waits too early or too late is told apart."""

from __future__ import annotations

from tests.scheduled_code import NONE, decoded, loops, most_in_flight, unawaited

LOAD = r"\bLDG\b"


def printed(*instructions: tuple[str, int, tuple[int, ...]]) -> str:
    """What the disassembler prints of instructions: text, the counter that one sets, those that it waits for."""
    lines = []
    for i, (text, sets, waits) in enumerate(instructions):
        upper = sets << 46 | NONE << 49 | sum(1 << counter for counter in waits) << 52
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;   /* 0x0000000000000000 */")
        lines.append(f"                                                /* 0x{upper:016x} */")
    return "\n".join(lines)


TWO_AT_ONCE = (
    ("LDG.E.128 R4, desc[UR4][R2.64]", 0, ()),
    ("@P0 LDG.E.128 R8, desc[UR4][R2.64+0x10]", 1, ()),
    ("FADD R4, R4, R8", NONE, (0, 1)),
    ("@P1 BRA 0x0", NONE, ()),
    ("EXIT", NONE, ()),
)
ONE_AT_A_TIME = (TWO_AT_ONCE[0], ("IADD3 R3, R4, 1, RZ", NONE, (0,)), *TWO_AT_ONCE[1:])


def test_counters_texts_and_branches_are_decoded():
    found = decoded(printed(*TWO_AT_ONCE))
    assert [one.address for one in found] == [0, 16, 32, 48, 64]
    assert [one.sets for one in found] == [0, 1, None, None, None]
    assert found[2].waits == {0, 1} and found[2].text == "FADD R4, R4, R8"
    assert found[3].target == 0 and not found[3].ends_a_path and found[4].ends_a_path
    (loop,) = loops(found)
    assert loop == found[:4]


def test_loads_that_wait_for_each_other_are_not_in_flight_together():
    assert most_in_flight(decoded(printed(*TWO_AT_ONCE)), LOAD) == 2
    assert most_in_flight(decoded(printed(*ONE_AT_A_TIME)), LOAD) == 1


def test_a_load_that_nothing_waits_for_is_found():
    found = decoded(printed(*TWO_AT_ONCE))
    assert unawaited(found, LOAD) == []
    assert unawaited(found[:2], LOAD) == found[:2]
