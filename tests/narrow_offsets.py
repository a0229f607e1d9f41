"""Finds offsets into memory that Triton computes as products of two run-time integers in 32 bits, which may overflow.

A level of 2^31 elements is no rarity, and no test on a small machine holds one: so the compiler's own code is read.
An offset is 64 bits wide from its first product of two run-time integers on. What :data:`BOUNDED` names is not: by
kernel and by the variable of its source, with what keeps it small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

VALUE = re.compile(r"%[\w$.]+(?:#\d+)?")
# What passes an integer on, or makes one of others; all else ends the search: a load, an argument, a program's number.
PASSING = (
    "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.extui", "arith.trunci", "arith.select",
    "arith.minsi", "arith.maxsi", "arith.divsi", "arith.remsi", "arith.shli",
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
)  # fmt: skip
FIXED = ("arith.constant", "tt.make_range")
BOUNDED = {
    "_pearson_": {"programs": "of a level; a grid has fewer than 2^31"},
    "_elastic_pointwise_": {"row": "p stride or q stride, a row or a column of one image"},
    "_elastic_conv_": {
        **dict.fromkeys(("h", "first_h", "w", "first_w"), "a row or a column of one image"),
        "weight_tap": "within the weights of one output channel",
    },
    "_elastic_levels_": {
        **dict.fromkeys(("h", "first_h", "w", "first_w"), "a row or a column of one image"),
        **dict.fromkeys(("first", "pixel"), "within a level of N H W < 2^30, see elastic_levels.MAX_PIXELS"),
        "tile": "within the weights of one output channel",
    },
}


@dataclass
class _Region:
    """A loop or a branch: what its results and, in a loop, its arguments may be."""

    results: str
    arguments: list[str] = field(default_factory=list)


@dataclass
class _Value:
    operation: str
    operands: list[str]
    line: str


def narrow_offsets(ttir: str) -> list[str]:
    """The products that an offset is made of and that are too narrow.

    Args:
        ttir: of a compiled kernel.

    Returns:
        What multiplies two run-time integers in 32 bits where the product reaches the offset of a ``tt.addptr``,
        widened later or not: lines of the code, but for those of :data:`BOUNDED`.
    """
    kernel = re.search(r"tt\.func public @(\w+)", ttir)[1]
    bounded = {name for kind, names in BOUNDED.items() if kernel.startswith(kind) for name in names}
    values, sources, offsets = _read(ttir)
    found: dict[str, None] = {}
    seen: set[str] = set()
    while offsets:
        name = offsets.pop()
        if name in seen:
            continue
        seen.add(name)
        offsets += sources.get(name, [])
        value = values.get(name)
        if value is None or value.operation not in PASSING:
            continue
        offsets += value.operands
        is_narrow = re.search(r"(?:: |x)i32(?:>|$)", value.line) is not None
        is_product = value.operation == "arith.muli" and not any(
            _is_fixed(operand, values, sources) for operand in value.operands
        )
        if is_product and is_narrow and re.sub(r"_\d+$", "", name[1:]) not in bounded:
            found[value.line] = None
    return list(found)


def _read(ttir: str) -> tuple[dict[str, _Value], dict[str, list[str]], list[str]]:
    """Values by name; what the values of loops and branches may be; the offsets."""
    values: dict[str, _Value] = {}
    sources: dict[str, list[str]] = {}
    offsets: list[str] = []
    regions: list[_Region] = []
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*", "", line).strip()
        if text.startswith("scf.yield") and regions:
            region = regions[-1]
            for i, given in enumerate(VALUE.findall(text.split(" : ")[0])):
                for name in (f"{region.results}#{i}", *region.arguments[i : i + 1]):
                    sources.setdefault(name, []).append(given)
        elif match := re.match(r"(?:(%[\w$.]+)(?::\d+)? = )?scf\.(for|if|while)\b(.*)\{$", text):
            region = _Region(match[1] or "")
            for i, (argument, first) in enumerate(re.findall(r"(%[\w$.]+) = (%[\w$.]+(?:#\d+)?)[,)]", match[3])):
                region.arguments.append(argument)
                sources.setdefault(argument, []).append(first)
                sources.setdefault(f"{region.results}#{i}", []).append(first)
            sources[region.results] = [f"{region.results}#0"]  # of one result alone
            regions.append(region)
        elif match := re.match(r"(%[\w$.]+) = \"?([\w.]+)\"? ?(.*)$", text):
            operands = VALUE.findall(match[3].split(" : ")[0])
            if match[2] == "arith.select":
                operands = operands[1:]
            elif match[2] in ("arith.divsi", "arith.remsi"):
                operands = operands[:1]
            values[match[1]] = _Value(match[2], operands, text)
            if match[2] == "tt.addptr":
                offsets.append(operands[1])
        elif text == "}" and regions and not line.startswith("  }"):
            regions.pop()
    return values, sources, offsets


def _is_fixed(name: str, values: dict[str, _Value], sources: dict[str, list[str]]) -> bool:
    """Whether a value is known when the kernel is compiled."""
    value = values.get(name)
    if value is None or name in sources:
        return False
    if value.operation in FIXED:
        return True
    return value.operation in PASSING and all(_is_fixed(operand, values, sources) for operand in value.operands)
