"""Elastic convolution of levels over drawn sizes, kernels and channel lists, by the 2x rule."""

import pytest
import torch

pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from tests.ops.elastic_conv_cases import Problem
from tests.ops.elastic_levels_cases import Pyramid, assert_matches_float64

OP = "elastic_levels"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter


@st.composite
def _channels(draw, maximum: int):
    count = draw(st.integers(1, maximum))
    kind = draw(st.sampled_from(["all", "leading", "listed", "tensor"]))
    if kind == "all":
        return None
    indices = draw(st.permutations(range(maximum)))[:count]
    return {"leading": count, "listed": indices, "tensor": torch.tensor(indices)}[kind]


@st.composite
def _pyramids(draw) -> Pyramid:
    rows, columns = draw(st.integers(1, 11)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 1), (5, 3)]))
    centre = tuple(draw(st.sampled_from(range(size, 0, -2))) for size in kernel)
    padding = tuple((full - size) // 2 + draw(st.integers(0, 2)) for full, size in zip(kernel, centre, strict=True))
    size = st.tuples(st.integers(1, 2), st.integers(5, 6), st.integers(3, 5))
    problem = Problem(
        inputs=draw(_channels(columns)), outputs=draw(_channels(rows)), weight=(rows, columns, *kernel),
        window={"padding": padding}, kernel=draw(st.sampled_from([None, centre])), bias=draw(st.booleans()),
        channels_last=draw(st.booleans()), seed=draw(st.integers(0, 999)),
    )  # fmt: skip
    return Pyramid(problem, tuple(draw(st.lists(size, min_size=1, max_size=3))), draw(st.booleans()))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(pyramid=_pyramids())
def test_matches_float64_wherever_it_is_drawn(backend, device, pyramid):
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert_matches_float64(pyramid, torch.float32, device)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
