"""The net that finds offsets of Triton kernels in 32 bits catches what is planted, and nothing else."""

from __future__ import annotations

import pytest

from tests.narrow_offsets import narrow_offsets

HEAD = "  tt.func public @{kernel}(%x_ptr: !tt.ptr<f32>, %rows: i32, %width: i32, %wide: i64) attributes {{}} {{\n"
POINTER = "    %at = tt.addptr %x_ptr, {} : !tt.ptr<f32>, {}\n  }}\n"


def found(code: str, offset: str, kind: str = "i32", kernel: str = "_pack_kernel") -> list[str]:
    lines = "".join(f"    {line.strip()} loc(#loc1)\n" for line in code.strip().splitlines())
    return narrow_offsets(HEAD.format(kernel=kernel) + lines + POINTER.format(offset, kind))


PRODUCT = "%first = arith.muli %rows, %width : i32"


@pytest.mark.parametrize(
    ("code", "offset", "kind"),
    [
        (PRODUCT, "%first", "i32"),
        (f"{PRODUCT}\n%late = arith.extsi %first : i32 to i64", "%late", "i64"),
        (f"{PRODUCT}\n%part = arith.divsi %first, %width : i32", "%part", "i32"),
        (f"{PRODUCT}\n%one = arith.select %is, %first, %rows : i32", "%one", "i32"),
        (
            """%lanes = tt.splat %rows : i32 -> tensor<8xi32>
            %every = tt.splat %width : i32 -> tensor<8xi32>
            %first_3 = arith.muli %lanes, %every : tensor<8xi32>
            %out = arith.addi %first_3, %lanes : tensor<8xi32>""",
            "%out",
            "tensor<8xi32>",
        ),
        (
            f"""%zero = arith.constant 0 : i32
            {PRODUCT}
            %end:2 = scf.for %i = %zero to %rows step %width iter_args(%a = %zero, %b = %zero) -> (i32, i32) : i32 {{
            %next = arith.addi %b, %first : i32
            scf.yield %a, %next : i32, i32
            }}""",
            "%end#1",
            "i32",
        ),
        (
            f"""%one = arith.constant 1 : i32
            {PRODUCT}
            %end = scf.if %is -> (i32) {{
            scf.yield %first : i32
            }} else {{
            scf.yield %one : i32
            }}""",
            "%end",
            "i32",
        ),
    ],
    ids=["plain", "widened too late", "divided", "selected", "of tensors", "carried by a loop", "out of a branch"],
)
def test_a_narrow_product_is_caught_wherever_it_goes(code, offset, kind):
    assert len(found(code, offset, kind)) == 1


@pytest.mark.parametrize(
    ("code", "offset"),
    [
        ("%first = arith.muli %wide, %wide : i64", "%first"),
        ("%c = arith.constant 1024 : i32\n%first = arith.muli %rows, %c : i32", "%first"),
        (
            "%c = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32>\n"
            "%r = tt.splat %rows : i32 -> tensor<8xi32>\n%first = arith.muli %r, %c : tensor<8xi32>",
            "%first",
        ),
        (f"{PRODUCT}\n%mask = arith.cmpi slt, %first, %rows : i32", "%rows"),
    ],
    ids=["64 bits", "a constant factor", "a range", "a mask"],
)
def test_what_cannot_overflow_or_is_no_offset_is_left_alone(code, offset):
    assert found(code, offset) == []


def test_what_is_bounded_in_one_kernel_is_not_in_another():
    assert found(PRODUCT, "%first", kernel="_elastic_levels_fwd_kernel") == []
    assert found(PRODUCT, "%first", kernel="_pearson_plane_stats_kernel")
