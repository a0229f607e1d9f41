"""The convolutions that `jdkd tune` times are those that detectors have, and every way of each computes the same."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from jdkd import _backend
from jdkd.ops import elastic_kernels, elastic_levels_kernels
from jdkd.tune import convolutions
from jdkd.tune.convolutions import DEPTHWISE, LEADING, Filters

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by Triton's interpreter
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAST = torch.channels_last
KINDS = [*LEADING, *(filters._replace(is_listed=True) for filters in LEADING), *DEPTHWISE]


@pytest.fixture
def interpreted():
    """Triton's kernels run on the CPU."""
    pytest.importorskip("triton")
    if not _backend.interpreting():
        pytest.skip("runs in Triton's interpreter")


@pytest.fixture(scope="module")
def timed() -> dict[bool, set[str]]:
    """The regions of a GPU, of the quick shapes and of all."""
    return {
        quick: {shape.table.region(shape.call) for shape in convolutions.kernels(GPU, quick)} for quick in (True, False)
    }


def region(filters: Filters, side: int, width: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Of a convolution of a channels-last image on a GPU."""
    shape = convolutions.of_kernels(GPU, dtype, LAST, filters, (side, side), width, both=True)
    return shape.table.region(shape.call)


@pytest.mark.parametrize(
    ("filters", "side", "width"),
    [
        (Filters(3, 2), 56, (128, 128)),  # a stage of a ResNet-50 begins
        (Filters(1, 2), 56, (256, 512)),  # its shortcut
        (Filters(3, 2), 25, (256, 256)),  # P6 and P7
        (Filters(3, is_depthwise=True), 40, (120, 120)),  # a MobileNet, the heads of SSDlite
        (Filters(5, 2, is_depthwise=True), 40, (72, 72)),
        (Filters(3), 100, (128, 128)),
    ],
    ids=str,
)
def test_what_detectors_call_is_in_a_region_that_is_probed(timed, filters, side, width):
    assert region(filters, side, width) in timed[True] and region(filters, side, width, torch.float32) in timed[False]


def test_lists_of_channels_have_regions_of_their_own(timed):
    filters, given = Filters(3, is_listed=True), (32, (64, 64))
    assert region(filters, *given) == f"listed {region(Filters(3), *given)}"
    assert region(filters, *given) in timed[False] - timed[True]  # neither pools nor searches make any


def test_every_class_of_sizes_is_probed(timed):
    ends = elastic_kernels.POSITIONS, elastic_kernels.WEIGHTS
    positions, weights = ([*(f"<{end}" for end in each), f">={each[-1]}"] for each in ends)
    for filters, here, there in itertools.product(LEADING, positions, weights):
        name = f"{filters.taps}x{filters.taps}, stride {filters.stride}, float16, contiguous"
        assert f"{name}, {here} positions, {there} weights a tap" in timed[False]


@pytest.mark.parametrize("filters", KINDS, ids=str)
def test_every_way_of_every_kind_computes_what_a_plain_convolution_does(interpreted, filters):
    width, side = ((8, 8) if filters.is_depthwise else (4, 6)), 5
    shape = convolutions.of_kernels(CPU, torch.float32, LAST, filters, (side, side), width, both=True)
    given = shape.make()
    rows, columns = (
        torch.arange(channels.count) if channels.index is None else channels.index
        for channels in (given.outputs, given.inputs)
    )
    groups = width[0] if filters.is_depthwise else 1
    part = given.weight[rows] if filters.is_depthwise else given.weight[rows][:, columns]
    y = F.conv2d(given.x, part, None, filters.stride, filters.taps // 2, 1, groups)
    exact = torch.autograd.grad(y, (given.x, given.weight), given.dout)
    ways = [row.name for row in shape.table.candidates if row.can_run(shape.call) is None]
    assert ways == ["aten"] or "implicit_gemm" in ways
    for name in ways:
        torch.testing.assert_close(shape.runs[name](given), exact, rtol=1e-4, atol=1e-4)


def test_levels_are_timed_both_ways_and_1x1_too():
    shapes = list(convolutions.levels(CPU, quick=False))
    regions = {shape.table.region(shape.call) for shape in shapes}
    sizes = "<1 MiB", "<16 MiB", ">=16 MiB"
    assert regions == {
        f"{taps}, {dtype}, {size}"
        for taps, dtype, size in itertools.product(("1x1", "3x3"), ("float32", "bfloat16", "float16"), sizes)
    }
    assert {shape.label.rpartition(", ")[2] for shape in shapes} == {"both ways", "forward"}


def test_both_ways_of_levels_compute_the_same(interpreted, monkeypatch):
    monkeypatch.setattr(convolutions, "PYRAMIDS", ((4, 4),))
    for shape in (shape for shape in convolutions.levels(CPU, quick=True) if "both ways" in shape.label):
        given = shape.make()
        ours, exact = (shape.runs[name](given) for name in (elastic_levels_kernels.OP, "aten"))
        assert len(exact) == 6  # five levels' and the weight's
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
