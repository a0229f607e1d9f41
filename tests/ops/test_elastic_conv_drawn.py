"""Elastic convolution over drawn shapes, windows and channel lists, by the 2x rule."""

import pytest
import torch

pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from tests.ops.elastic_conv_cases import Problem, assert_within_twice

OP = "elastic_conv"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter


@st.composite
def _channels(draw, maximum: int):
    count = draw(st.integers(1, maximum))
    kind = draw(st.sampled_from(["all", "leading", "listed", "tensor"]))
    if kind == "all":
        return None
    if kind == "leading":
        return count
    indices = draw(st.permutations(range(maximum)))[:count]
    return torch.tensor(indices) if kind == "tensor" else indices


@st.composite
def _problems(draw) -> Problem:
    rows, columns = draw(st.integers(1, 11)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (1, 5), (5, 4)]))
    centre = tuple(draw(st.sampled_from(range(size, 0, -2))) for size in kernel)
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    needed = [d * (full - size) // 2 for d, full, size in zip(dilation, kernel, centre, strict=True)]
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return Problem(
        inputs=draw(_channels(columns)),
        outputs=draw(_channels(rows)),
        weight=(rows, columns, *kernel),
        image=(draw(st.integers(1, 2)), draw(st.integers(9, 11)), draw(st.integers(9, 11))),
        window={
            "stride": draw(pair),
            "padding": (needed[0] + draw(st.integers(0, 2)), needed[1] + draw(st.integers(0, 3))),
            "dilation": dilation,
        },
        kernel=draw(st.sampled_from([None, centre])),
        bias=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def _products(draw) -> Problem:
    """What the path of the 1x1 product takes."""
    whole = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return Problem(
        inputs=draw(st.integers(1, whole[1])),
        outputs=draw(st.integers(1, whole[0])),
        weight=(*whole, 1, 1),
        image=(draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(2, 9))),
        window={"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2))},
        bias=draw(st.booleans()),
        channels_last=True,
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(problem=_problems())
def test_matches_float64_wherever_it_is_drawn(backend, device, problem):
    assert_within_twice(problem, torch.float32, device)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(problem=_products())
def test_a_1x1_product_matches_float64_wherever_it_is_drawn(backend, device, problem):
    assert_within_twice(problem, torch.float32, device)
