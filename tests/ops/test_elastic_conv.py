"""Elastic convolution against its float64 reference, on every backend that this machine can run."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import elastic_conv2d
from jdkd.ops.active_channels import Channels, active_part
from jdkd.ops.elastic_implicit_gemm import _ElasticConv
from jdkd.reference.elastic_conv import elastic_depthwise_conv2d
from tests.ops.elastic_conv_cases import Problem, assert_close_as_eager, assert_within_twice, results
from tests.ops.turns import take_turns

OP = "elastic_conv"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by the interpreter
    pytest.mark.usefixtures("exact_products"),
]
PROBLEMS = {
    "all": Problem(window={"padding": 1}),
    "leading": Problem(3, 4, window={"padding": 1}),
    "leading-in": Problem(3, None),
    "leading-out": Problem(None, 1, bias=False),
    "listed": Problem([4, 0, 2], [6, 1], window={"padding": (2, 1), "stride": 2}),
    "listed-in": Problem([4, 0, 2], 5, window={"dilation": 2, "padding": 1}),
    "listed-out": Problem(2, [6, 1, 5], window={"stride": (1, 2)}),
    "permuted": Problem([2, 0, 1, 4, 3], [6, 0, 5, 1, 4, 2, 3], window={"dilation": (2, 1)}),
    "1x1": Problem([3, 1], 4, weight=(7, 5, 1, 1)),
    "1x1-strided": Problem(4, 4, weight=(7, 5, 1, 1), window={"stride": 2}),
    "wide": Problem(70, [*range(60, 130)], weight=(130, 90, 3, 3), image=(1, 6, 5), window={"padding": 1}),
    "vectors": Problem(16, [*range(8, 32)], weight=(40, 24, 3, 3), window={"padding": 1}),
    "vectors-listed-in": Problem([*range(4, 20)], 24, weight=(40, 24, 3, 3), window={"stride": 2}),
    "one": Problem([0], [0], weight=(1, 1, 3, 3), image=(1, 3, 3)),
    "centre": Problem(weight=(7, 5, 5, 5), kernel=3, window={"padding": 2}),
    "centre-leading": Problem(3, 4, weight=(7, 5, 5, 5), kernel=1, window={"padding": (2, 3), "stride": 2}),
    "centre-listed": Problem([4, 0], [6, 1, 2], weight=(7, 5, 4, 5), kernel=(2, 3), window={"padding": (2, 1)}),
    "centre-listed-out": Problem(4, [6, 1], weight=(7, 5, 3, 5), kernel=(3, 1), window={"padding": 4, "dilation": 2}),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
by_dynamo = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")


def _runs(dtype: torch.dtype, device: str) -> bool:
    """Whether this machine's torch convolves in ``dtype``: fp16 on a CPU needs the instructions."""
    with contextlib.suppress(RuntimeError):
        x = torch.ones(1, 1, 3, 3, dtype=dtype, device=device, requires_grad=True)
        F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=dtype, device=device)).sum().backward()
        return True
    return False


@problems
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_matches_float64_in_output_and_gradients(backend, device, problem, dtype, channels_last):
    take_turns(backend, device, [*PROBLEMS.values()].index(problem), dtype, channels_last)
    if not _runs(dtype, device):
        pytest.skip(f"torch has no {dtype} convolution on this {device}")
    problem = Problem(**{**vars(problem), "channels_last": channels_last})
    assert_within_twice(problem, dtype, device)


@pytest.mark.parametrize("given", [{"in_channels": 4}, {"out_channels": [5, 0, 3]}, {}], ids=str)
def test_depthwise_matches_float64(backend, device, given):
    generator = torch.Generator().manual_seed(0)
    active = next(iter(given.values()), 6)
    active = list(range(active)) if isinstance(active, int) else active
    shapes = (2, len(active), 6, 5), (6, 1, 3, 3), (6,)
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    window = {"stride": 2, "padding": 1}

    def reference(x, weight, bias):
        return elastic_depthwise_conv2d(x, weight, bias, channels=active, **window)

    found = results(lambda x, w, b: elastic_conv2d(x, w, b, groups=6, **given, **window), tensors)
    eager = results(reference, tensors, found["dout"])
    exact = results(reference, [tensor.double() for tensor in tensors], found["dout"])
    for name in ("y", "dx", "dweight", "dbias"):
        assert_close_as_eager(found[name], eager[name], exact[name], name)


@problems
def test_inactive_weights_are_never_read_and_never_get_a_gradient(backend, device, problem):
    x, weight, bias = problem.tensors(torch.float32, device)
    active = torch.zeros(weight.shape, dtype=torch.bool, device=device)
    active[torch.tensor(problem.rows)[:, None], torch.tensor(problem.columns)] = problem.centre.to(device)
    poisoned = torch.where(active, weight, torch.nan)
    if bias is not None:
        bias = torch.where(active.flatten(1).any(1), bias, torch.nan)
    for name, value in results(problem.ours, [x, poisoned, bias]).items():
        assert value.isfinite().all(), name
        if name == "dweight":
            assert not value[~active].any()


def test_subnets_that_share_a_graph_add_their_gradients(backend, device):
    subnets = [PROBLEMS["leading"], PROBLEMS["leading-out"], PROBLEMS["listed"], PROBLEMS["listed-in"]]
    _, weight, _ = subnets[0].tensors(torch.float32, device)
    inputs = [problem.tensors(torch.float32, device)[0] for problem in subnets]

    def gradient(weight, run):
        leaf = weight.clone().requires_grad_()
        sum(run(p)(x.to(leaf.dtype), leaf, None).sin().sum() for p, x in zip(subnets, inputs, strict=True)).backward()
        return leaf.grad

    exact, eager = (gradient(weight.to(wide), lambda p: p.reference) for wide in (torch.float64, torch.float32))
    assert_close_as_eager(gradient(weight, lambda p: p.ours), eager, exact, "dweight")


@pytest.mark.parametrize("name", ["leading", "listed", "1x1-strided", "one", "centre-listed"])
def test_keeps_the_layout_of_its_input(backend, device, name):
    for channels_last in (False, True):
        problem = Problem(**{**vars(PROBLEMS[name]), "channels_last": channels_last})
        tensors = problem.tensors(torch.float32, device)
        expected = torch.channels_last if channels_last else torch.contiguous_format
        assert problem.ours(*tensors).is_contiguous(memory_format=expected)


@pytest.mark.parametrize("name", ["leading", "listed"])
def test_takes_strided_inputs_and_weights(backend, device, name):
    problem = PROBLEMS[name]
    x, weight, bias = problem.tensors(torch.float32, device)
    expected = problem.ours(x, weight, bias)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, device=device)
    wide[..., ::2] = x
    transposed = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    torch.testing.assert_close(problem.ours(wide[..., ::2], transposed, bias), expected)
    flat = torch.cat([torch.full((3,), torch.nan, device=device), weight.flatten()])
    torch.testing.assert_close(problem.ours(x, flat[3:].view(weight.shape), bias), expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["leading", "listed", "1x1-strided"])
def test_takes_a_strided_bias(backend, device, name, channels_last):
    problem = Problem(**{**vars(PROBLEMS[name]), "channels_last": channels_last})
    x, weight, bias = problem.tensors(torch.float32, device)
    gaps = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]  # stride 2
    torch.testing.assert_close(problem.ours(x, weight, gaps), problem.ours(x, weight, bias))


def test_autocast_computes_in_low_precision_and_keeps_the_gradient_of_the_master(backend, device):
    problem = PROBLEMS["leading"]
    tensors = problem.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        found = results(problem.ours, tensors)
    assert found["y"].dtype == torch.bfloat16
    exact = results(problem.reference, [t.double() for t in tensors], found["dout"])
    for name in ("dx", "dweight", "dbias"):
        assert found[name].dtype == torch.float32
    for name, value in exact.items():
        allowed = 2**-6 * value.abs().max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=allowed)


@by_dynamo
@pytest.mark.parametrize("name", ["leading", "listed", "1x1", "centre-leading", "centre-listed"])
def test_a_fixed_subnet_compiles_into_one_graph(backend, device, name):
    torch._dynamo.reset()
    problem = PROBLEMS[name]
    tensors = problem.tensors(torch.float32, device)
    expected = results(problem.ours, tensors)
    compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
    for name, value in results(compiled, tensors).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("name", ["leading", "listed", "1x1"])
def test_operators_pass_opcheck(backend, device, name):
    problem = PROBLEMS[name]
    x, weight, bias = problem.tensors(torch.float32, device)
    in_index, out_index = (
        None if value is None or isinstance(value, int) else torch.tensor(value, device=device)
        for value in (problem.inputs, problem.outputs)
    )
    window = [problem.window.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    window = [[value, value] if isinstance(value, int) else list(value) for value in window]
    tail = (in_index, out_index, len(problem.rows), *window, 1)
    forward, backward = torch.ops.jdkd.elastic_conv_fwd.default, torch.ops.jdkd.elastic_conv_bwd.default
    torch.library.opcheck(forward, (x, weight, bias, *tail))
    dout = torch.ones_like(forward(x, weight, bias, *tail))
    torch.library.opcheck(backward, (dout, x, weight, *tail, [True, True, bias is not None]))
    if backend == "reference":
        torch.library.opcheck(backward, (dout, x, weight, *tail, [False, True, False]))


@pytest.mark.parametrize("name", ["leading", "listed-out", "centre-leading", "centre-listed"])
def test_second_derivatives_of_the_composed_route(name):
    problem = Problem(**{**vars(PROBLEMS[name]), "image": (1, 4, 4)})
    tensors = [tensor.requires_grad_() for tensor in problem.tensors(torch.float64, "cpu")]
    assert torch.autograd.gradcheck(problem.ours, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(problem.ours, tensors, fast_mode=True)


def test_gradients_of_the_operator_route_are_exact():
    problem = Problem([3, 0], [5, 1, 6], image=(1, 4, 4))
    tensors = [tensor.requires_grad_() for tensor in problem.tensors(torch.float64, "cpu")]
    tail = (torch.tensor(problem.inputs), torch.tensor(problem.outputs), 3, (1, 1), (1, 0), (1, 1), 1)
    assert torch.autograd.gradcheck(lambda *t: _ElasticConv.apply(*t, *tail), tensors)
    y = _ElasticConv.apply(*tensors, *tail)
    (first,) = torch.autograd.grad(y.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_operators_take_depthwise_groups():
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(6, 1, 3, 3)
    rows = torch.tensor([5, 0, 2])
    y = torch.ops.jdkd.elastic_conv_fwd(x, weight, None, None, rows, 3, (1, 1), (1, 1), (1, 1), 3)
    torch.testing.assert_close(y, F.conv2d(x, weight[rows], padding=1, groups=3))


def test_functional_transforms_see_through_leading_channels():
    problem = PROBLEMS["leading"]
    x, weight, bias = problem.tensors(torch.float64, "cpu")
    expected = results(problem.ours, [x, weight, bias], torch.ones((), dtype=torch.float64).expand(2, 4, 6, 7))

    def total(weight):
        return problem.ours(x, weight, bias).sum()

    torch.testing.assert_close(torch.func.grad(total)(weight), expected["dweight"])
    stacked = torch.stack([weight, 2 * weight])
    each = torch.stack([problem.ours(x, one, bias) for one in stacked])
    torch.testing.assert_close(torch.func.vmap(lambda w: problem.ours(x, w, bias))(stacked), each)


def test_an_image_beyond_two_to_the_31_elements(backend, device, tmp_path):
    if device != "cpu":
        pytest.skip("the image is a sparse file, which only a CPU can map")
    apart = 2**31 + 64  # elements between two images
    file = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), True, 2 * (apart + 64))
    x = torch.empty(0, dtype=torch.float16).set_(file, 0, (2, 2, 4, 4), (apart, 16, 4, 1))
    x.copy_(torch.randn(2, 2, 4, 4))
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float16)
    y = elastic_conv2d(x, weight, padding=1)
    expected = F.conv2d(x.clone().float(), weight.float(), padding=1)
    torch.testing.assert_close(y.float(), expected, rtol=2**-9, atol=2**-8)


def test_the_kernel_is_opt_in(device):
    problem = PROBLEMS["leading"]
    y = problem.ours(*[t.requires_grad_() for t in problem.tensors(torch.float32, device)])
    assert "Convolution" in y.grad_fn.name()


def test_forced_kernel_leaves_groups_to_aten(device):
    with use_backend("triton") if device == "cuda" else contextlib.nullcontext():
        y = elastic_conv2d(torch.ones(1, 2, 4, 4, device=device), torch.ones(4, 1, 3, 3, device=device),
                           in_channels=2, groups=4)  # fmt: skip
    torch.testing.assert_close(y, torch.full((1, 2, 2, 2), 9.0, device=device))


def test_a_depthwise_kernel_shrinks_to_its_centre(backend, device):
    x, weight = torch.randn(2, 3, 6, 6, device=device), torch.randn(5, 1, 5, 5, device=device, requires_grad=True)
    rows = [4, 0, 1]
    y = elastic_conv2d(x, weight, in_channels=rows, kernel_size=3, padding=2, groups=5)
    torch.testing.assert_close(y, F.conv2d(x, weight[rows, :, 1:4, 1:4], padding=1, groups=3))
    y.sum().backward()
    assert weight.grad[rows, :, 1:4, 1:4].all()
    assert weight.grad.count_nonzero() == 27


def test_the_centre_is_read_in_place_without_a_copy():
    weight = torch.randn(8, 6, 5, 5, requires_grad=True)
    part = active_part(weight, Channels(4), Channels(3), (3, 1))
    assert part.data_ptr() == weight[:, :, 1, 2].data_ptr()
    torch.testing.assert_close(part, weight[:4, :3, 1:4, 2:3], rtol=0, atol=0)


def test_padding_by_name(backend, device):
    x, weight = torch.randn(1, 3, 6, 6, device=device), torch.randn(5, 3, 3, 3, device=device)
    for padding, pixels in (("same", 1), ("valid", 0)):
        torch.testing.assert_close(
            elastic_conv2d(x, weight, out_channels=2, padding=padding),
            F.conv2d(x, weight[:2], padding=pixels),
        )
    centre = elastic_conv2d(x, weight, kernel_size=1, padding="same")
    torch.testing.assert_close(centre, F.conv2d(x, weight[:, :, 1:2, 1:2]))


def test_an_image_without_batch(backend, device):
    x, weight = torch.randn(3, 6, 6, device=device), torch.randn(5, 3, 3, 3, device=device)
    torch.testing.assert_close(elastic_conv2d(x, weight, out_channels=[4]), F.conv2d(x, weight[4:]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_channels": 6}, ["in_channels", "6", "5", "wider"]),
        ({"out_channels": [7]}, ["out_channels", "7", "0 to 6"]),
        ({"in_channels": 4}, ["x has 5", "4 input channels"]),
        ({"in_channels": torch.ones(5, dtype=torch.bool)}, ["boolean mask"]),
        ({"in_channels": [0, 1, 2, 3, 3]}, ["3 twice"]),
        ({"kernel_size": 2}, ["kernel_size=2", "3x3", "1, 3"]),
        ({"kernel_size": 5}, ["kernel_size=5", "3x3"]),
        ({"kernel_size": (3, 0)}, ["kernel_size=(3, 0)"]),
        ({"kernel_size": "3"}, ["kernel_size='3'", "no kernel size"]),
        ({"kernel_size": 1}, ["kernel_size=1x1 of 3x3", "1, 1 pixels less", "padding=0"]),
        ({"kernel_size": 1, "padding": (0, 3)}, ["1, 1 pixels less", "padding=(0, 3)"]),
        ({"kernel_size": 1, "padding": "valid"}, ["1, 1 pixels less", "'valid'"]),
        ({"kernel_size": 1, "padding": 1, "dilation": (1, 2)}, ["1, 2 pixels less", "padding=1"]),
    ],
)
def test_refuses_channels_that_do_not_fit(arguments, words):
    x, weight, bias = PROBLEMS["all"].tensors(torch.float32, "cpu")
    with pytest.raises(InputError) as caught:
        elastic_conv2d(x, weight, bias, **arguments)
    for word in words:
        assert word in str(caught.value)
