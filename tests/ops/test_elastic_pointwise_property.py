"""Elastic 1x1 convolution over drawn shapes, widths, epilogues and dtypes, by the 2x rule."""

import contextlib
from unittest import mock

import pytest
import torch

pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import HealthCheck, example, given, settings

from tests.ops.elastic_pointwise_cases import EPILOGUES, Problem, assert_matches_float64

OP = "elastic_pointwise"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by the interpreter
    pytest.mark.usefixtures("exact_products"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED_TWICE = Problem(weight=(1, 17), active=(1, 16), image=(1, 1, 8), stride=2, epilogue="relu_then_add", seed=1)


@st.composite
def _problems(draw) -> Problem:
    whole = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    active = tuple(draw(st.one_of(st.integers(1, most), st.just(max(1, most // 8 * 8)))) for most in whole)
    return Problem(
        weight=(whole[0], draw(st.sampled_from([whole[1], -(-whole[1] // 8) * 8]))),
        active=(min(active[0], whole[0]), min(active[1], whole[1])),
        image=(draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        stride=draw(st.sampled_from([1, 2])),
        epilogue=draw(st.sampled_from(EPILOGUES)),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(problem=_problems(), dtype=st.sampled_from(DTYPES), descriptors=st.booleans())
@example(ROUNDED_TWICE, torch.float16, True)
def test_matches_float64_wherever_it_is_drawn(backend, device, problem, dtype, descriptors):
    dtype = torch.float32 if backend == "reference" else dtype
    route = contextlib.nullcontext()
    if backend == "triton" and not descriptors:
        route = mock.patch("jdkd.kernels.elastic_pointwise.has_tma", return_value=False)
    cut_off = dtype == torch.bfloat16 and device == "cpu"  # by the interpreter, where a GPU rounds
    with route:
        assert_matches_float64(problem, dtype, device, slack=8 if cut_off else 1)
