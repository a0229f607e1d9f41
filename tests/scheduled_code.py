"""What the machine code of sm_90 says of its own order: which instruction waits for which, decoded from the encoding.

Every instruction has 128 bits. The upper half ends in what the compiler schedules with: one of six counters that stands
until a result has arrived, one until operands have been read, and those that must be zero before the instruction goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

NONE = 7  # no counter
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/")


class Instruction(NamedTuple):
    """One instruction.

    Args:
        address: in bytes from the kernel's first.
        text: as the disassembler writes it, with its predicate.
        sets: the counter that stands until its result has arrived, or None.
        waits: counters that must be zero before it.
    """

    address: int
    text: str
    sets: int | None
    waits: frozenset[int]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\bBRA(?:\.\w+)* (?:!?U?P\w+, )*`?\(?(?:\.L_x_\w+|0x([0-9a-f]+))", self.text)
        return int(found[1], 16) if found and found[1] else None

    @property
    def ends_a_path(self) -> bool:
        """Whether what follows is reached from elsewhere alone."""
        return re.match(r"(?:BRA|EXIT|RET|BRX)\b", self.text) is not None and "P" not in self.text.split(" ", 1)[0]


def decoded(text: str) -> list[Instruction]:
    """The instructions of one kernel, from what ``cuobjdump -sass`` prints of it."""
    found = []
    for address, words, upper in LINE.findall(text):
        bits = int(upper, 16)
        sets, masked = bits >> 46 & 7, bits >> 52 & 63
        waits = frozenset(i for i in range(6) if masked >> i & 1)
        found.append(Instruction(int(address, 16), words, None if sets == NONE else sets, waits))
    return found


def loops(instructions: list[Instruction]) -> Iterator[list[Instruction]]:
    """The innermost loops, each from where a branch goes back to until that branch."""
    places = {instruction.address: i for i, instruction in enumerate(instructions)}
    ends = [
        (places[instruction.target], i)
        for i, instruction in enumerate(instructions)
        if instruction.target is not None and instruction.target < instruction.address
    ]
    for first, last in ends:
        if not any(first <= begin and end <= last and (begin, end) != (first, last) for begin, end in ends):
            yield instructions[first : last + 1]


def most_in_flight(instructions: list[Instruction], pattern: str) -> int:
    """How many loads that match are asked for, at most, before anything waits for one of them; in the order of code."""
    pending: dict[int, int] = {}
    most = 0
    for instruction in instructions:
        for counter in instruction.waits:
            pending[counter] = 0
        if instruction.sets is not None and re.search(pattern, instruction.text):
            pending[instruction.sets] = pending.get(instruction.sets, 0) + 1
        most = max(most, sum(pending.values()))
        if instruction.ends_a_path:
            pending = {}
    return most


def unawaited(instructions: list[Instruction], pattern: str) -> list[Instruction]:
    """The loads that match and that nothing waits for up to the end of the list."""
    pending: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        for counter in instruction.waits:
            pending[counter] = []
        if re.search(pattern, instruction.text):
            pending.setdefault(NONE if instruction.sets is None else instruction.sets, []).append(instruction)
    return [load for loads in pending.values() for load in loads]
