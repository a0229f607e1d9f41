"""The general Triton kernel of the elastic convolution by itself: what a change of subnet compiles."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from jdkd import _backend
from jdkd.kernels import elastic_conv
from tests.compilations import Compilations

pytestmark = pytest.mark.skipif(not _backend.interpreting(), reason="runs in Triton's interpreter")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SIZES = [(1, 7), (9, 9), (200, 304), (37, 133), (64, 65)]  # the first two fill no GPU: another tile


def compiled(monkeypatch, sizes: list[tuple[int, int]], layout: torch.memory_format, *, careless: bool = False) -> int:
    """How many variants a 3x3 layer of 256 to 256 channels compiles over 20 masks, at every size."""
    kernel = Compilations(elastic_conv._elastic_conv_fwd_kernel, careless=careless)
    monkeypatch.setattr(elastic_conv, "_elastic_conv_fwd_kernel", kernel)
    draw = random.Random(0)
    weight = torch.empty(256, 256, 3, 3, dtype=torch.bfloat16).to(memory_format=layout)

    def mask() -> Tensor:
        count = draw.choice([draw.randint(1, 256), 8 * draw.randint(1, 32)])
        return torch.tensor(draw.sample(range(257), count + 1))[draw.randint(0, 1) :][:count]  # begins anywhere

    for _ in range(20):
        lists, bias = (mask(), mask()), torch.empty(257)[draw.randint(0, 1) :]
        for size in sizes:
            x, y = (torch.empty(2, len(index), *size, dtype=torch.bfloat16).to(memory_format=layout) for index in lists)
            elastic_conv.elastic_conv_fwd(x, weight, bias, y, *lists, (1, 1), (1, 1), (1, 1), True)
    return len(kernel.keys)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sizes", [SIZES[:2], SIZES[2:]], ids=["small", "large"])
def test_twenty_masks_compile_at_most_two_variants(monkeypatch, sizes, layout):
    assert compiled(monkeypatch, sizes, layout) == 2  # rows of whole vectors, and others


def test_the_net_catches_widths_that_invite_variants(monkeypatch):
    assert compiled(monkeypatch, SIZES[2:], torch.channels_last, careless=True) > 2
