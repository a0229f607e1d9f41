"""Which kernel an elastic convolution takes, by request and by measurement, and that every kernel is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from jdkd import _backend, _dispatch, env
from jdkd._backend import interpreting, use_backend
from jdkd.errors import InputError
from jdkd.functional import elastic_conv2d
from jdkd.ops import elastic_kernels
from jdkd.ops.active_channels import Channels
from jdkd.ops.elastic_conv import convolve
from jdkd.ops.elastic_implicit_gemm import implicit_gemm
from jdkd.ops.elastic_kernels import KERNELS, NAME, ConvCall, Product, call_of, dtype_of, explain, region, select
from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d
from tests.dispatched import Dispatched
from tests.ops.elastic_conv_cases import Problem, assert_close_as_eager, assert_within_twice, results
from tests.tuned import tuned

OP = "elastic_conv"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by the interpreter
    pytest.mark.usefixtures("exact_products"),
]
by_dynamo = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
POINTWISE = {
    "leading": Problem(16, 24, weight=(40, 48, 1, 1), channels_last=True),
    "strided": Problem(8, 4, weight=(7, 8, 1, 1), window={"stride": 2}, channels_last=True),
    "odd": Problem(13, 11, weight=(37, 29, 1, 1), image=(3, 5, 3), channels_last=True),
    "no bias": Problem(3, None, weight=(7, 5, 1, 1), bias=False, channels_last=True),
    "centre": Problem(3, 4, weight=(7, 5, 3, 3), kernel=1, window={"padding": 1}, channels_last=True),
    "dilated": Problem(3, 4, weight=(7, 5, 1, 1), window={"dilation": 3}, channels_last=True),
}
problems = pytest.mark.parametrize("problem", POINTWISE.values(), ids=POINTWISE)


def _call(device: str = "cpu", dtype: torch.dtype = torch.float32, positions: int = 70, **changes) -> ConvCall:
    """A call that every kernel takes, and what is changed of it."""
    product = Product(torch.device(device), dtype, positions, 16, 24)
    return ConvCall(product, (1, 1), (1, 1), (0, 0), 1, False, True, True)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "kernel", "words"),
    [
        ({}, "pointwise", None),
        ({"stride": (2, 2)}, "pointwise", None),
        ({"positions": 2**30 - 1}, "pointwise", None),
        ({"positions": 2**30}, "aten", "fewer than 1073741824 positions"),
        ({"kernel": (3, 3)}, "implicit_gemm", "a 1x1 kernel"),
        ({"stride": (1, 2)}, "implicit_gemm", "stride 1 or 2, both ways alike"),
        ({"stride": (3, 3)}, "implicit_gemm", "stride 1 or 2, both ways alike"),
        ({"padding": (0, 1)}, "implicit_gemm", "no padding"),
        ({"is_listed": True}, "implicit_gemm", "leading channels"),
        ({"is_channels_last": False}, "implicit_gemm", "a channels-last image"),
        ({"padding": "same"}, "aten", "no padding"),
        ({"groups": 2}, "aten", "one group"),
        ({"is_batch": False}, "aten", "a batch of images"),
    ],
    ids=str,
)
def test_every_call_has_its_kernel_and_the_reasons(backend, device, changes, kernel, words):
    call = _call(device, **changes)
    chosen, why, others = explain(call)
    if backend == "reference":
        assert (chosen, select(call)) == ("aten", "aten")
        assert all(words in dict(others)["pointwise"] for words in [words or "the backend reference was asked for"])
        return
    assert (chosen, select(call)) == (kernel, kernel)
    assert why.startswith("it was asked for") == (kernel != "aten")
    assert [name for name, _ in others] == [row.name for row in KERNELS if row.name != kernel]
    if words:
        assert words in dict(others)["pointwise"]
    else:
        assert dict(others)["implicit_gemm"] == dict(others)["aten"] == "pointwise comes first"


def test_a_kernel_waits_until_it_is_asked_for(monkeypatch, device):
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    assert elastic_kernels.only_aten(torch.device(device))
    chosen, why, others = explain(_call(device))
    assert chosen == "aten" and "nothing was measured on a GPU" in why
    assert dict(others).pop("matmul") == "where `jdkd tune` found it faster"
    assert all("JDKD_BACKEND=triton" in reason for name, reason in others if name != "matmul")
    monkeypatch.setenv("JDKD_BACKEND", "triton")
    assert not elastic_kernels.only_aten(torch.device(device)) and select(_call(device)) == "pointwise"
    monkeypatch.setenv("JDKD_BACKEND", "cuda")  # of other operators
    assert select(_call(device)) == "aten"


def test_a_request_that_cannot_run_is_refused(device):
    with use_backend("triton"), pytest.raises(InputError, match="float64"):
        select(_call(device, torch.float64))
    with use_backend("cuda"), pytest.raises(InputError, match="no backend 'cuda'"):
        select(_call(device))


def test_a_choice_runs_no_operator():
    x = torch.randn(2, 16, 5, 7)
    with Dispatched() as dispatched:
        explain(call_of(x, Channels(16), Channels(3), (3, 3), 1, "same", 1, 1))
    assert not {name for name in dispatched.names if name != "empty"}  # a table is asked for a device and a dtype


def _operators(problem: Problem, tensors: list[Tensor | None]) -> list[str]:
    with Dispatched() as dispatched:
        results(problem.ours, tensors)
    return [name for name in dispatched.names if name.startswith("elastic_")]


@problems
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_pointwise_kernel_matches_float64(backend, device, problem, dtype):
    if backend == "reference":
        pytest.skip("that is ATen")
    names = ["elastic_pointwise_fwd", "elastic_pointwise_bwd"]
    assert _operators(problem, problem.tensors(dtype, device)) == names
    assert_within_twice(problem, dtype, device)


def test_the_pointwise_kernel_computes_in_bfloat16(backend, device):
    problem = POINTWISE["odd"]
    tensors = problem.tensors(torch.bfloat16, device)
    found = results(problem.ours, tensors)
    exact = results(problem.reference, [tensor.double() for tensor in tensors], found["dout"])
    for name, value in found.items():
        assert (value - exact[name]).abs().max() <= 2**-6 * exact[name].abs().max(), name


@problems
def test_no_kernel_reads_inactive_weights_or_gives_them_a_gradient(backend, device, problem):
    x, weight, bias = problem.tensors(torch.float32, device)
    active = torch.zeros(weight.shape, dtype=torch.bool, device=device)
    active[torch.tensor(problem.rows)[:, None], torch.tensor(problem.columns)] = problem.centre.to(device)
    poisoned = torch.where(active, weight, torch.nan)
    bias = None if bias is None else torch.where(active.flatten(1).any(1), bias, torch.nan)
    found = results(problem.ours, [x, poisoned, bias])
    assert all(value.isfinite().all() for value in found.values())
    assert not found["dweight"][~active].any()


def test_two_widths_of_one_graph_add_their_gradients(backend, device):
    subnets = [POINTWISE["leading"], Problem(48, 40, weight=(40, 48, 1, 1), channels_last=True)]
    _, weight, bias = subnets[0].tensors(torch.float32, device)
    images = [problem.tensors(torch.float32, device)[0] for problem in subnets]

    def gradient(dtype: torch.dtype, run) -> list[Tensor]:
        leaves = [weight.to(dtype, copy=True).requires_grad_(), bias.to(dtype, copy=True).requires_grad_()]
        outputs = [run(problem)(x.to(dtype), *leaves) for problem, x in zip(subnets, images, strict=True)]
        sum(y.sin().sum() for y in outputs).backward()
        return [leaf.grad for leaf in leaves]

    ours = gradient(torch.float32, lambda problem: problem.ours)
    eager, exact = (gradient(dtype, lambda problem: problem.reference) for dtype in (torch.float32, torch.float64))
    for name, *three in zip(("dweight", "dbias"), ours, eager, exact, strict=True):
        assert_close_as_eager(*three, name)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_packed_weight_is_a_whole_one(backend, device, kernel):
    problem = Problem(13, 11, weight=(37, 29, kernel, kernel), channels_last=True)
    x, weight, bias = problem.tensors(torch.float32, device)
    part = weight[:11, :13].contiguous(memory_format=torch.channels_last)

    def packed(x, part, bias):
        return convolve(x, part, bias, Channels(13), Channels(11), 1, 0, 1, 1)

    found = results(packed, [x, part, bias[:11]])
    expected = results(problem.ours, [x, weight, bias], found["dout"])
    expected |= {"dweight": expected["dweight"][:11, :13], "dbias": expected["dbias"][:11]}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_autocast_keeps_the_gradient_of_the_master(backend, device):
    problem = POINTWISE["leading"]
    tensors = problem.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        found = results(problem.ours, tensors)
    assert found["y"].dtype == torch.bfloat16
    exact = results(problem.reference, [tensor.double() for tensor in tensors], found["dout"])
    for name in ("dx", "dweight", "dbias"):
        assert found[name].dtype == torch.float32
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= 2**-6 * value.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_casts_what_it_casts_of_a_convolution(dtype):
    x, weight = torch.ones(1, 2, 3, 3, dtype=dtype), torch.ones(4, 2, 1, 1, dtype=dtype)
    assert dtype_of(x) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert dtype_of(x) == torch.nn.functional.conv2d(x, weight).dtype
        assert dtype_of(x.to("meta")) == dtype
        implicit = implicit_gemm(x, weight, None, Channels(2), Channels(4), (1, 1), (0, 0), (1, 1))
        assert implicit.dtype == elastic_pointwise_conv2d(x, weight).dtype == dtype_of(x)


@pytest.fixture
def measured(monkeypatch, device) -> Iterator[str]:
    """The 1x1 kernel is said to be the fastest for calls like :func:`_call`; nobody asks for a backend."""
    if device == "cpu" and not interpreting():
        pytest.skip("no kernel runs on a CPU without Triton's interpreter")
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    with tuned(NAME, torch.device(device), **{region(_call(device)): "pointwise"}):
        yield region(_call(device))


@by_dynamo
def test_a_measurement_is_all_that_a_kernel_needs(measured, device):
    problem = POINTWISE["leading"]
    tensors = problem.tensors(torch.float32, device)
    assert _operators(problem, tensors) == ["elastic_pointwise_fwd", "elastic_pointwise_bwd"]
    assert_within_twice(problem, torch.float32, device)
    chosen, why, _ = explain(_call(device))
    assert chosen == "pointwise" and why.startswith("tuned on ") and "2.00 times as fast as default; " in why
    torch._dynamo.reset()
    compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
    expected = results(problem.ours, tensors)
    for name, value in results(compiled, tensors, expected["dout"]).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    with use_backend("reference"):
        assert dict(explain(_call(device))[2])["pointwise"] == "the backend reference was asked for"
    assert f"pointwise for {measured}, tuned on" in env.report()


@pytest.mark.parametrize(
    ("seen", "reason"), [(False, "it was checked on this device and not seen right"), (None, _dispatch.NOT_YET)]
)
def test_a_kernel_that_is_fastest_runs_only_where_it_was_seen_right(measured, monkeypatch, device, seen, reason):
    monkeypatch.setattr(_backend, "seen_right", lambda subject: subject.backend == "reference" or seen)
    call = _call(device)
    assert select(call) == "aten" and dict(explain(call)[2])["pointwise"] == reason
    assert (call in _dispatch.settled) == (seen is False)  # what is not checked yet is asked again
    assert not elastic_kernels.kernel_runs("pointwise", call)


def test_a_measurement_reaches_into_the_operators(monkeypatch, measured, device):
    from jdkd.kernels import elastic_pointwise as kernels

    launched, launch = [], kernels.elastic_pointwise_fwd
    monkeypatch.setattr(kernels, "elastic_pointwise_fwd", lambda *a, **k: launched.append(a) or launch(*a, **k))
    tensors = POINTWISE["leading"].tensors(torch.float32, device)
    POINTWISE["leading"].ours(*tensors)
    assert len(launched) == 1


@pytest.mark.parametrize(
    "outside",
    [{"positions": 512}, {"dtype": torch.bfloat16}, {"kernel": (3, 3)}, {"stride": (2, 2)}, {"is_listed": True}],
    ids=str,
)
def test_outside_of_a_region_nothing_changes(measured, device, outside):
    assert select(_call(device)) == select(_call(device, positions=511)) == "pointwise"
    assert select(_call(device, **outside)) == "aten"
    assert elastic_kernels.only_aten(torch.device("cpu" if device == "cuda" else "meta")), "nothing was measured there"


def test_a_choice_is_kept_by_what_it_looks_at_and_not_beyond_a_request(measured, device):
    def chosen(x: Tensor, *window) -> str:
        return elastic_kernels.name_of(x, Channels(16), Channels(24), (1, 1), *(window or (1, 0, 1, 1)))

    x = torch.zeros(1, 16, 7, 10, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        assert chosen(last) == "pointwise"
        assert {chosen(x), chosen(last.half()), chosen(last, (2, 2), 0, 1, 1)} == {"aten"}
        assert chosen(last, [1, 1], [0, 0], 1, 1) == "pointwise"
        with use_backend("reference"):
            assert chosen(last) == "aten"
        with torch.autocast(device, torch.bfloat16):
            assert chosen(last) == "aten"


def test_calls_that_are_not_timed_have_no_region():
    usual = "1x1, stride 1, float32, channels-last, <512 positions, <1024 weights a tap"
    assert region(_call()) == usual and region(_call(is_listed=True)) == f"listed {usual}"
    assert region(_call(stride=(2, 2))) == usual.replace("stride 1", "stride 2")
    several = ({"groups": 2}, {"groups": 16, "kernel": (5, 5), "stride": (2, 2)})
    assert {region(_call(**changes)) for changes in several} == {"several groups, float32"}
    for changes in ({"kernel": (5, 5)}, {"kernel": (3, 1)}, {"stride": (1, 2)}, {"is_batch": False}):
        assert region(_call(**changes)) is region(_call(**changes, padding="same")) is None


@by_dynamo
@problems
def test_a_kernel_compiles_into_one_graph(backend, device, problem):
    torch._dynamo.reset()
    tensors = problem.tensors(torch.float32, device)
    expected = results(problem.ours, tensors)
    compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
    for name, value in results(compiled, tensors).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("columns", [1, 13, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operand_of_a_descriptor_has_rows_of_whole_16_bytes(monkeypatch, dtype, columns):
    from jdkd.kernels import elastic_pointwise as kernels
    from jdkd.ops.elastic_pointwise import _operand

    monkeypatch.setattr(kernels, "has_tma", lambda device: True)
    weight = torch.randn(8, columns, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    operand = _operand(weight, 5, columns, dtype)
    assert torch.equal(operand[:5], weight.flatten(1)[:5]) and operand.stride(1) == 1
    assert operand.stride(0) * dtype.itemsize % 16 == 0 and operand.data_ptr() % 16 == 0
    is_whole = columns * dtype.itemsize % 16 == 0
    assert (operand.data_ptr() == weight.data_ptr()) == is_whole, "a weight of whole vectors is read where it lies"


def test_the_report_shows_the_table(device):
    text = env.report()
    for kernel in KERNELS:
        (line,) = (row for row in text.splitlines() if row.strip().startswith(f"elastic: {kernel.name} "))
        assert kernel.when in line and kernel.why in line


def test_an_image_that_lies_both_ways_keeps_its_layout(backend, device):
    x, weight = torch.randn(2, 5, 1, 1, device=device), torch.randn(7, 5, 1, 1, device=device)
    assert elastic_conv2d(x, weight, out_channels=4).is_contiguous()
