"""Elastic 1x1 convolution against its float64 specification, on every backend that this machine can run."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import elastic_conv2d
from jdkd.ops.elastic_pointwise import (
    _ElasticPointwise,
    elastic_pointwise_conv2d,
    elastic_pointwise_conv2d_stats,
)
from tests.ops.elastic_pointwise_cases import EPILOGUES, Problem, assert_matches_float64, results

OP = "elastic_pointwise"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by the interpreter
    pytest.mark.usefixtures("exact_products"),
]
SIMPLE = {
    "whole": Problem(),
    "leading": Problem((40, 48), (24, 16)),
    "strided": Problem((40, 48), (16, 32), image=(2, 6, 7), stride=2),
    "one channel": Problem((8, 8), (1, 8), image=(2, 3, 3)),
}
PROBLEMS = SIMPLE | {
    "odd": Problem((37, 29), (23, 13), image=(3, 3, 5)),
    "odd-strided": Problem((37, 29), (11, 29), image=(1, 7, 9), stride=2),
    "wider than a tile": Problem((150, 96), (136, 80), image=(1, 9, 8)),
    "one": Problem((3, 5), (1, 1), image=(1, 1, 1)),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
by_dynamo = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")


def _with(problem: Problem, **changes) -> Problem:
    return dataclasses.replace(problem, **changes)


def _interpreted(backend: str, device: str) -> bool:
    """Whether Triton's interpreter runs this, which is slow."""
    return backend == "triton" and device == "cpu"


@problems
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_matches_float64_in_output_and_gradients(backend, device, problem, epilogue):
    place = [*PROBLEMS.values()].index(problem)
    if _interpreted(backend, device) and place < len(SIMPLE) and place != EPILOGUES.index(epilogue) % len(SIMPLE):
        pytest.skip("in the interpreter simple problems take turns")
    assert_matches_float64(_with(problem, epilogue=epilogue), torch.float32, device)


@pytest.mark.parametrize("name", ["leading", "odd", "strided"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_matches_float64(backend, device, dtype, epilogue, name):
    turn = ("leading", "odd", "strided")[(EPILOGUES.index(epilogue) + (dtype == torch.float16)) % 3]
    if _interpreted(backend, device) and name != turn:
        pytest.skip("in the interpreter the problems take turns")
    if backend == "reference" and epilogue in ("bottleneck", "relu_then_add"):
        pytest.skip("ATen rounds before the epilogue, which moves the relu")
    if backend == "reference" and device == "cpu" and dtype == torch.float16:
        pytest.skip("ATen's fp16 convolution on a CPU needs its instructions")
    # The interpreter cuts float32 off to bfloat16, where a GPU rounds.
    rounds_once = backend == "triton" and (device == "cuda" or dtype == torch.float16)
    problem = _with(PROBLEMS[name], epilogue=epilogue)
    assert_matches_float64(problem, dtype, device, slack=1 if rounds_once else 4)


def test_tf32_is_allowed_where_torch_allows_it(backend, device):
    torch.backends.cudnn.allow_tf32 = True
    problem = PROBLEMS["leading"]
    tensors = problem.tensors(torch.float32, device)
    (y,), (exact,) = problem.ours(**tensors), problem.specified(**{k: t.double() for k, t in tensors.items()})
    assert (y - exact).abs().max() <= 2**-9 * exact.abs().max()


@pytest.mark.parametrize("name", ["leading", "odd", "strided"])
def test_statistics_survive_a_large_mean(backend, device, name):
    problem = _with(PROBLEMS[name], epilogue="stats", offset=1000.0)
    tensors = problem.tensors(torch.float32, device)
    _, mean, variance = problem.ours(**tensors)
    y, exact_mean, exact_variance = problem.specified(**{key: tensor.double() for key, tensor in tensors.items()})
    assert (mean - exact_mean).abs().max() <= 2**-20 * y.abs().max()
    assert ((variance - exact_variance) / exact_variance).abs().max() <= 2e-3  # of y itself, 1e-4 of whose size is left


def test_statistics_over_more_tiles_than_one_merge_takes(backend, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 96, 97, generator=generator).to(device)  # 292 tiles of 64 positions
    x[1] += torch.linspace(-4, 4, 97, device=device)
    weight = torch.randn(3, 4, generator=generator).to(device)
    y, mean, variance = elastic_pointwise_conv2d_stats(x, weight)
    exact, exact_mean = torch.var_mean(
        torch.einsum("nchw,oc->nohw", x.double(), weight.double()), (0, 2, 3), correction=0
    )
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6 * y.abs().max().item())
    torch.testing.assert_close(variance.double(), exact, rtol=2e-6, atol=0)


@problems
def test_inactive_weights_are_never_read_and_never_get_a_gradient(backend, device, problem):
    problem = _with(problem, epilogue="affine")
    tensors = problem.tensors(torch.float32, device)
    active = torch.zeros(problem.weight, dtype=torch.bool, device=device)
    active[: problem.active[0], : problem.active[1]] = True
    tensors["weight"] = torch.where(active, tensors["weight"], torch.nan)
    found = results(problem.ours, tensors)
    for name in ("y", "dx", "dweight", "dscale", "dshift"):
        assert found[name].isfinite().all(), name
    assert not found["dweight"][~active].any()


@pytest.mark.parametrize("epilogue", ["plain", "bottleneck", "stats"])
def test_equals_the_elastic_convolution_with_what_follows_it(backend, device, epilogue):
    problem = _with(PROBLEMS["strided"], epilogue=epilogue)
    tensors = problem.tensors(torch.float32, device)
    tensors["weight"] = tensors["weight"][..., None, None]

    def composed(x, weight, scale=None, shift=None, residual=None):
        y = elastic_conv2d(x, weight, in_channels=32, out_channels=16, stride=2)
        if epilogue == "stats":
            return y, y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        return (y if scale is None else F.relu(y * scale[:, None, None] + shift[:, None, None] + residual),)

    found = results(problem.ours, tensors)
    expected = results(composed, tensors, found.pop("douts"))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("epilogue", ["bottleneck", "stats"])
def test_two_runs_give_the_same_bits(backend, device, epilogue):
    problem = Problem((40, 48), (24, 16), image=(2, 20, 33), epilogue=epilogue)
    tensors = problem.tensors(torch.float32, device)
    first, second = results(problem.ours, tensors), results(problem.ours, tensors)
    assert first.pop("douts") and second.pop("douts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_takes_any_layout_and_returns_channels_last(backend, device):
    problem = _with(PROBLEMS["leading"], epilogue="bottleneck")
    tensors = problem.tensors(torch.float32, device)
    expected = results(problem.ours, tensors)
    rows = torch.full((40, 60), torch.nan, device=device)
    rows[:, 5:53] = tensors["weight"]
    others = {
        "x": tensors["x"].contiguous(),
        "residual": tensors["residual"].contiguous(),
        "weight": tensors["weight"].T.contiguous().T,  # columns first
    }
    for name, tensor in [*others.items(), ("weight", rows[:, 5:53])]:  # rows at odd addresses
        found = results(problem.ours, tensors | {name: tensor})
        assert found["y"].is_contiguous(memory_format=torch.channels_last)
        for key in ("y", "dx", "dweight", "dresidual"):
            torch.testing.assert_close(found[key], expected[key], msg=f"{name}: {key}")


def test_a_master_of_another_dtype_keeps_its_gradient(backend, device):
    problem = PROBLEMS["leading"]
    tensors = problem.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        found = results(problem.ours, tensors)
    assert found["y"].dtype == torch.bfloat16 and found["dweight"].dtype == torch.float32
    exact = results(problem.specified, {name: tensor.double() for name, tensor in tensors.items()}, found["douts"])
    for name in ("y", "dx", "dweight"):
        assert (found[name] - exact[name]).abs().max() <= 2**-6 * exact[name].abs().max(), name


def test_autocast_takes_a_residual_that_it_casts(backend, device):
    x, weight = torch.ones(1, 8, 2, 2, device=device), torch.ones(8, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert elastic_pointwise_conv2d(x, weight, residual=x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(InputError, match=r"residual is torch.float64 and x torch.float32"):
            elastic_pointwise_conv2d(x, weight, residual=x.double())


@pytest.mark.parametrize("unneeded", ["x", "weight"])
def test_what_needs_no_gradient_gets_none(backend, device, unneeded):
    tensors = PROBLEMS["leading"].tensors(torch.float32, device)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != unneeded)
    PROBLEMS["leading"].ours(**tensors)[0].sum().backward()
    assert tensors[unneeded].grad is None
    assert next(tensor for name, tensor in tensors.items() if name != unneeded).grad.any()


def test_an_empty_batch_goes_through(backend, device):
    x = torch.empty(0, 4, 3, 3, device=device)
    assert elastic_pointwise_conv2d(x, torch.ones(6, 8, device=device), out_channels=5).shape == (0, 5, 3, 3)


@by_dynamo
@pytest.mark.parametrize("epilogue", ["plain", "bottleneck", "relu_then_add", "stats"])
def test_compiles_into_one_graph(backend, device, epilogue):
    torch._dynamo.reset()
    problem = _with(PROBLEMS["leading"], epilogue=epilogue)
    tensors = problem.tensors(torch.float32, device)
    expected = results(problem.ours, tensors)
    found = results(torch.compile(problem.ours, fullgraph=True, backend="aot_eager"), tensors, expected["douts"])
    for name in expected.keys() - {"douts"}:
        torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize(
    ("name", "epilogue"),
    [("leading", "plain"), *(("odd-strided", epilogue) for epilogue in ("bottleneck", "relu_then_add", "stats"))],
)
def test_operators_pass_opcheck(backend, device, name, epilogue):
    problem = _with(PROBLEMS[name], epilogue=epilogue)
    tensors = problem.tensors(torch.float32, device)
    operands = [tensors.get(key) for key in ("x", "weight", "scale", "shift", "residual")]
    forward, backward = torch.ops.jdkd.elastic_pointwise_fwd.default, torch.ops.jdkd.elastic_pointwise_bwd.default
    tail = (problem.active[0], problem.stride, problem.activation, epilogue == "stats")
    torch.library.opcheck(forward, (*operands, *tail))
    dout = torch.ones_like(forward(*operands, *tail)[0])
    for wanted in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(backward, (dout, *operands[:2], problem.stride, wanted))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradients_are_exact(epilogue):
    problem = Problem((6, 5), (4, 3), image=(2, 3, 4), stride=2, epilogue=epilogue)
    tensors = {name: tensor.double().requires_grad_() for name, tensor in problem.tensors(torch.float64, "cpu").items()}
    operands = [tensors.get(key) for key in ("x", "weight", "scale", "shift", "residual")]
    tail = (4, 2, problem.activation, epilogue == "stats")

    def outputs(*given):
        y, moments = _ElasticPointwise.apply(*given, *tail)
        return (y, moments) if epilogue == "stats" else y

    assert torch.autograd.gradcheck(outputs, operands)


def test_the_kernel_is_opt_in(monkeypatch, device):
    from jdkd.kernels import elastic_pointwise as kernels

    launched = []
    monkeypatch.setattr(kernels, "elastic_pointwise_fwd", lambda *args, **kwargs: launched.append(args))
    tensors = PROBLEMS["leading"].tensors(torch.float32, device)
    elastic_pointwise_conv2d(**tensors, out_channels=24)
    assert not launched
    with use_backend("triton"):
        elastic_pointwise_conv2d(**tensors, out_channels=24)
    assert len(launched) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.ones(2, 3)}, ["2-dimensional", "[N, Cin, H, W]"]),
        ({"x": torch.ones(1, 9, 2, 2)}, ["9 channels", "8"]),
        ({"weight": torch.ones(6, 8, 3, 3)}, ["(6, 8, 3, 3)", "elastic_conv2d"]),
        ({"out_channels": 7}, ["out_channels", "7", "6"]),
        ({"out_channels": [5, 0]}, ["out_channels", "leading"]),
        ({"stride": 3}, ["stride=3", "1 or 2"]),
        ({"scale": torch.ones(6)}, ["scale", "without shift"]),
        ({"scale": torch.ones(6), "shift": torch.ones(5)}, ["shift", "(5,)", "[6]"]),
        ({"residual": torch.ones(1, 6, 2, 3)}, ["residual", "(1, 6, 2, 3)", "(1, 6, 2, 2)"]),
        ({"residual": torch.ones(1, 6, 2, 2).half()}, ["residual", "float16", "float32"]),
        ({"activation": "gelu"}, ["gelu", "relu_then_add"]),
    ],
    ids=str,
)
def test_refuses_what_does_not_fit(changes, words):
    given = {"x": torch.ones(1, 8, 2, 2), "weight": torch.ones(6, 8)} | changes
    with pytest.raises(InputError) as caught:
        elastic_pointwise_conv2d(**given)
    for word in words:
        assert word in str(caught.value)
