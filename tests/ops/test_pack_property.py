"""Packing over drawn shapes, lists, kernels, dtypes and layouts: every backend gives the bits of the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from jdkd._backend import use_backend
from jdkd.ops.active_channels import Channels, active_channels
from jdkd.ops.pack import Part, pack, packed_weights, unpack_add_
from jdkd.ops.pack_table import COPY, GATHER, TURN, TURN_CELLS, table_of
from tests.ops.pack_cases import DTYPES, weight

OP = "pack"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter


@st.composite
def _active(draw, maximum: int) -> Channels:
    count = draw(st.integers(1, maximum))
    kind = draw(st.sampled_from(["all", "leading", "listed"]))
    if kind == "listed":
        return active_channels(draw(st.permutations(range(maximum)))[:count], maximum, "channels")
    return Channels(maximum if kind == "all" else count)


@st.composite
def _parts(draw) -> tuple[Tensor, Part]:
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32, 64]))
    shape = [draw(sizes), draw(sizes), draw(st.integers(1, 7)), draw(st.integers(1, 5))]
    shape = shape[: draw(st.sampled_from([4, 4, 4, 2, 1]))]
    kernel = None
    if len(shape) == 4 and draw(st.booleans()):
        kernel = tuple(draw(st.sampled_from(range(size, 0, -2))) for size in shape[2:])
    columns = draw(st.one_of(st.none(), _active(shape[1]))) if len(shape) > 1 else None
    whole = weight(shape, draw(st.integers(0, 99)), last=draw(st.booleans()))
    return whole, Part(draw(_active(shape[0])), columns, kernel)


def _everything(weights: list[Tensor], parts: list[Part], gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Packed weights, dense gradients, and gradients added in place."""
    leaves = [whole.clone().requires_grad_() for whole in weights]
    packed = packed_weights(leaves, parts, dtype)
    torch.autograd.backward(packed, gradients)
    added = [whole.clone() for whole in weights]
    unpack_add_(added, parts, gradients)
    return [*(view.detach() for view in packed), *(leaf.grad for leaf in leaves), *added]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(_parts(), min_size=1, max_size=4), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans())
def test_agrees_with_the_reference_bit_for_bit(backend, device, drawn, shared, dtype, last):
    weights, parts = [whole.to(device, shared) for whole, _ in drawn], [part for _, part in drawn]
    with use_backend("reference"):
        shapes = [view.shape for view in pack(weights, parts, dtype)]
        gradients = [weight(shape, 100 + i, dtype, last).to(device) for i, shape in enumerate(shapes)]
        expected = _everything(weights, parts, gradients, dtype)
    for found, wanted in zip(_everything(weights, parts, gradients, dtype), expected, strict=True):
        assert found.stride() == wanted.stride() and torch.equal(found, wanted)


@settings(max_examples=100)
@given(_parts(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_pieces_cover_a_part_once_and_modes_hold_what_they_promise(drawn, shared, dtype):
    whole, part = drawn
    whole = whole.to(shared)
    columns = part.columns or Channels(whole.shape[1] if whole.dim() > 1 else 1)
    kernel = part.kernel or (tuple(whole.shape[2:]) if whole.dim() == 4 else (1, 1))
    sizes = [part.rows.count, columns.count, *kernel]
    table = table_of([whole], [whole.stride()], [part.rows.index], [columns.index], sizes, dtype)
    r, c, h, w, rs, cs, ys, xs, offset, _, column_list, mode, tile_rows, tile_columns = table.parts[0].tolist()[:14]
    assert r * c * h * w == part.rows.count * columns.count * kernel[0] * kernel[1]
    seen = torch.zeros(r, c, dtype=torch.int32)
    for _, row, column, _ in table.pieces.tolist():
        seen[row : row + tile_rows, column : column + tile_columns] += 1
    assert (seen == 1).all()
    if mode == COPY:
        assert cs == 1 and column_list < 0 and c * dtype.itemsize % 16 == 0
        steps = [offset, *(step for size, step in ((r, rs), (h, ys), (w, xs)) if size > 1)]
        assert all(step * whole.element_size() % 16 == 0 for step in steps)
    assert mode in (COPY, GATHER, TURN)
    assert mode != TURN or tile_rows * h * w * (-(-tile_columns // 4) * 4 + 4) <= TURN_CELLS
