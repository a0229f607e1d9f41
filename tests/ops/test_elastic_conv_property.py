"""Elastic convolution over drawn shapes, windows, groups, channel lists and dtypes, by the 2x rule."""

import pytest
import torch

pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from jdkd.errors import InputError
from jdkd.functional import elastic_conv2d
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
def _sides(draw) -> dict:
    """Weight's first two sizes, groups, and what is active: ungrouped, depthwise, or in groups that stay whole."""
    kind = draw(st.sampled_from(["ungrouped", "ungrouped", "depthwise", "multiplied", "grouped"]))
    if kind == "ungrouped":
        rows, columns = draw(st.integers(1, 11)), draw(st.integers(1, 9))
        return {"inputs": draw(_channels(columns)), "outputs": draw(_channels(rows)), "sizes": (rows, columns)}
    groups = draw(st.integers(2, 6))
    if kind == "depthwise":
        given = draw(_channels(groups))
        side = draw(st.sampled_from([("inputs",), ("outputs",), ("inputs", "outputs")]))
        return {**dict.fromkeys(side, given), "sizes": (groups, 1), "groups": groups}
    rows = draw(st.integers(2, 3))
    if kind == "multiplied":
        return {"inputs": draw(_channels(groups)), "sizes": (rows * groups, 1), "groups": groups}
    columns, kept = draw(st.integers(2, 3)), draw(st.integers(1, groups))
    counts = {"inputs": kept * columns, "outputs": kept * rows}
    side = draw(st.sampled_from([("inputs",), ("outputs",), ("inputs", "outputs")]))
    return {**{name: counts[name] for name in side}, "sizes": (rows * groups, columns), "groups": groups}


@st.composite
def _problems(draw) -> Problem:
    sides = draw(_sides())
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (1, 5), (5, 4)]))
    centre = tuple(draw(st.sampled_from(range(size, 0, -2))) for size in kernel)
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    needed = [d * (full - size) // 2 for d, full, size in zip(dilation, kernel, centre, strict=True)]
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return Problem(
        weight=(*sides.pop("sizes"), *kernel),
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
        **sides,
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


def _runs(dtype: torch.dtype, device: str) -> bool:
    """Whether this machine's torch convolves in ``dtype``: fp16 on a CPU needs the instructions."""
    try:
        x = torch.ones(1, 1, 3, 3, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.conv2d(x, torch.ones_like(x)).sum().backward()
    except RuntimeError:
        return False
    return True


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(problem=_problems(), tf32=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_matches_float64_wherever_it_is_drawn(backend, device, dtype, problem, tf32):
    if not _runs(dtype, device):
        pytest.skip(f"torch has no {dtype} convolution on this {device}")
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        assert_within_twice(problem, dtype, device)
    finally:
        torch.backends.cudnn.allow_tf32 = before


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(problem=_products())
def test_a_1x1_product_matches_float64_wherever_it_is_drawn(backend, device, problem):
    assert_within_twice(problem, torch.float32, device)


@st.composite
def _unfit(draw, maximum: int) -> list[int]:
    """Lists that are no channels of ``maximum``: empty, with one twice, or with one that there is not."""
    indices = draw(st.permutations(range(maximum)))[: draw(st.integers(1, maximum))]
    place = draw(st.integers(0, len(indices)))
    wrong = draw(st.sampled_from(["empty", "twice", "beyond", "negative"]))
    if wrong == "empty":
        return []
    extra = {"twice": draw(st.sampled_from(indices)), "beyond": maximum, "negative": -1}[wrong]
    return [*indices[:place], extra, *indices[place:]]


@settings(max_examples=60)
@given(indices=_unfit(7), argument=st.sampled_from(["in_channels", "out_channels"]), as_tensor=st.booleans())
@pytest.mark.parametrize("groups", [1, 7], ids=["ungrouped", "depthwise"])
def test_refuses_every_list_that_is_no_set_of_channels(groups, indices, argument, as_tensor):
    given = torch.tensor(indices, dtype=torch.int64) if as_tensor else indices
    with pytest.raises(InputError, match=argument):
        elastic_conv2d(torch.ones(1, 7, 3, 3), torch.ones(7, 7 // groups, 1, 1), **{argument: given}, groups=groups)
