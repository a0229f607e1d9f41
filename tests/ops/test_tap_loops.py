"""No convolution is shipped in the form that Triton miscompiles: a flattened loop over taps at eight warps or more."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from jdkd.kernels import elastic_conv, elastic_levels
from tests.tap_loops import flattened_loops, loops_around_products

KERNELS = Path(elastic_conv.__file__).parent


def test_no_kernel_takes_the_counter_of_a_loop_apart():
    sources = {path.name: path.read_text() for path in KERNELS.glob("*.py")}
    assert sum("tl.dot(" in source for source in sources.values()) >= 4
    assert {name: found for name, source in sources.items() if (found := flattened_loops(source))} == {}


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        ("for i in range(R * S * nk):\n  r = i // nk // S\n  y = tl.dot(a, b, y)", "i // nk // S"),
        ("for i in range(n):\n  j = i + first\n  c = j % nk\n  y = tl.dot(a, b, y)", "j % nk"),
        ("for i in tl.range(n, flatten=True):\n  for j in range(m):\n    y = tl.dot(a, b, y)", "flatten=True"),
        ("while i < n:\n  y = tl.dot(a, b, y)", "while"),
    ],
)
def test_a_flattened_loop_is_caught(loop, reason):
    body = "\n".join("    " + line for line in loop.splitlines())
    found = flattened_loops(f"def kernel(a, b, y, n, m, nk, R, S, first):\n{body}\n    return y")
    assert found and all(entry.startswith("kernel:") for entry in found)
    assert reason in " ".join(found)


def test_loops_are_counted_in_the_code_of_the_compiler():
    nested = """
      tt.func @kernel(%a: i32) {
        %0 = scf.for %r = %c0 to %h step %c1 iter_args(%t = %z) -> (tensor<64x64xf32>)  : i32 {
          %1 = arith.cmpi slt, %r, %h : i32
          %2 = scf.for %c = %c0 to %n step %c1 iter_args(%u = %t) -> (tensor<64x64xf32>)  : i32 {
            %3 = tt.dot %a, %b, %u : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>
            scf.yield %3 : tensor<64x64xf32>
          } loc(#loc1)
          scf.yield %2 : tensor<64x64xf32>
        } loc(#loc2)
        %4 = ttng.warp_group_dot %a, %b, %0 : tensor<64x64xf32>
      }
    """
    assert loops_around_products(nested) == [2, 0]


class Launches:
    """Stands in for a kernel and notes how it would be launched."""

    def __init__(self) -> None:
        self.settings: list[dict] = []

    def __getitem__(self, grid):
        return lambda *given, **named: self.settings.append(named)


def _drawn_launches(monkeypatch) -> tuple[Launches, Launches]:
    """Every launch over layouts, dtypes, devices with descriptors and without, sizes, widths and lists."""
    general, levels = Launches(), Launches()
    monkeypatch.setattr(elastic_conv, "_elastic_conv_fwd_kernel", general)
    monkeypatch.setattr(elastic_levels, "_elastic_levels_fwd_kernel", levels)
    dtypes, sizes, widths = (torch.float32, torch.bfloat16), ((1, 1), (60, 70), (200, 300)), (8, 20, 64, 256)
    for dtype, size, width, tma, tf32 in itertools.product(dtypes, sizes, widths, (True, False), (True, False)):
        monkeypatch.setattr(elastic_levels, "has_tma", lambda device, tma=tma: tma)
        for layout, listed in itertools.product((torch.channels_last, torch.contiguous_format), (True, False)):
            x = torch.empty(1, width, *size, dtype=dtype, device="meta").contiguous(memory_format=layout)
            weight = torch.empty(256, 256, 3, 3, dtype=dtype, device="meta").contiguous(memory_format=layout)
            index = torch.arange(width) if listed else None
            unit = (1, 1)
            elastic_conv.elastic_conv_fwd(x, weight, None, x, index, None, unit, unit, unit, tf32)
    return general, levels


def test_whatever_can_be_launched_runs_four_warps_and_is_compiled_by_the_gates(monkeypatch):
    general, levels = _drawn_launches(monkeypatch)
    assert len(general.settings) > 100 and len(levels.settings) > 50
    assert {launch["num_warps"] for launch in general.settings + levels.settings} == {4}
    gated = set()
    for dtype, _, precision in elastic_levels.AOT_KINDS:
        for _, constants, blocks in elastic_levels.aot_tiles(dtype, precision):
            gated.add((*(constants[key] for key in ("V", "PRECISION", "WIDE", "TMA")), *blocks.values()))
    keys = ("V", "PRECISION", "WIDE", "TMA", "BLOCK_M", "BLOCK_N", "BLOCK_K")
    used = {tuple(launch[key] for key in keys) for launch in levels.settings}
    assert used <= gated and len(used) > 8
