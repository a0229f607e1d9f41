"""Elastic convolution of all levels against its float64 reference, on every backend that this machine can run."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.functional import elastic_conv2d, elastic_conv2d_levels
from jdkd.ops.elastic_levels import _ElasticLevels
from tests.ops.elastic_conv_cases import Problem
from tests.ops.elastic_levels_cases import Pyramid, assert_matches_float64, results

OP = "elastic_levels"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter
PADDED = {"padding": 1}
PYRAMIDS = {
    "all": Pyramid(),
    "leading": Pyramid(Problem(3, 4, window=PADDED), relu=True),
    "leading-out": Pyramid(Problem(None, 1, bias=False)  , sizes=((2, 4, 6), (1, 3, 3))),
    "listed": Pyramid(Problem([4, 0, 2], [6, 1], window={"padding": (2, 1)}), relu=True),
    "listed-in": Pyramid(Problem([4, 0, 2], 5, window=PADDED, bias=False)),
    "listed-out": Pyramid(Problem(2, [6, 1, 5], window={"padding": (0, 2)}), sizes=((1, 5, 4), (2, 3, 5))),
    "1x1": Pyramid(Problem([3, 1], 4, weight=(7, 5, 1, 1)), relu=True),
    "wide": Pyramid(Problem(40, 24, weight=(72, 48, 3, 3), window=PADDED), sizes=((2, 5, 6), (2, 2, 3)), relu=True),
    "five": Pyramid(Problem(3, 2, window=PADDED), sizes=((2, 5, 6), (2, 3, 3), (2, 2, 2), (2, 1, 2), (2, 1, 1))),
    "one level": Pyramid(sizes=((2, 4, 5),)),
    "smallest first": Pyramid(sizes=((1, 1, 1), (3, 5, 4))),
    "centre": Pyramid(Problem(3, 4, weight=(7, 5, 5, 5), kernel=3, window={"padding": 2})),
    "centre-listed": Pyramid(Problem([4, 0], [6, 1], weight=(7, 5, 3, 5), kernel=(1, 3), window={"padding": (1, 2)})),
}  # fmt: skip
pyramids = pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
by_dynamo = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _exact_products():
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pyramids
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_matches_float64_in_outputs_and_gradients(backend, device, pyramid, channels_last):
    if backend == "triton" and device == "cpu" and not channels_last and [*PYRAMIDS.values()].index(pyramid) % 3:
        pytest.skip("in the interpreter this layout, which takes the kernel of one level, has every third pyramid")
    assert_matches_float64(pyramid.of(channels_last=channels_last), torch.float32, device)


@pytest.mark.parametrize("name", ["leading", "listed"])
def test_takes_a_strided_bias(backend, device, name):
    pyramid = PYRAMIDS[name]
    weight, bias, *xs = pyramid.tensors(torch.float32, device)
    gaps = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]  # stride 2
    torch.testing.assert_close(pyramid.ours(weight, gaps, *xs), pyramid.ours(weight, bias, *xs))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_matches_float64_in_half_precision(backend, device, place, dtype, channels_last):
    try:
        F.conv2d(*(torch.ones(1, 1, 3, 3, dtype=dtype, device=device, requires_grad=True),) * 2).sum().backward()
    except RuntimeError:
        pytest.skip(f"torch has no {dtype} convolution on this {device}")
    if backend == "triton" and device == "cpu" and (place + channels_last + (dtype == torch.float16)) % 2:
        pytest.skip("in the interpreter the dtypes take turns")
    assert_matches_float64(
        PYRAMIDS[("leading", "listed", "wide")[place]].of(channels_last=channels_last), dtype, device
    )


@pyramids
def test_equals_a_convolution_of_every_level(pyramid):
    weight, bias, *xs = pyramid.tensors(torch.float64, "cpu")
    problem = pyramid.problem
    for x, y in zip(xs, pyramid.ours(weight, bias, *xs), strict=True):
        expected = problem.ours(x, weight, bias)
        torch.testing.assert_close(y, expected.relu() if pyramid.relu else expected)


@pytest.mark.parametrize("pyramid", [PYRAMIDS[name] for name in ("leading", "listed", "wide", "centre-listed")])
def test_inactive_weights_are_never_read_and_never_get_a_gradient(backend, device, pyramid):
    weight, bias, *xs = pyramid.tensors(torch.float32, device)
    problem = pyramid.problem
    active = torch.zeros(weight.shape, dtype=torch.bool, device=device)
    active[torch.tensor(problem.rows)[:, None], torch.tensor(problem.columns)] = problem.centre.to(device)
    poisoned = torch.where(active, weight, torch.nan)
    if bias is not None:
        bias = torch.where(active.flatten(1).any(1), bias, torch.nan)
    for name, value in results(pyramid.ours, [poisoned, bias, *xs])[0].items():
        assert value.isfinite().all(), name
        if name == "dweight":
            assert not value[~active].any()


def test_two_subnets_in_one_graph_are_right(backend, device):
    first, second = PYRAMIDS["leading"], PYRAMIDS["listed"]
    weight, bias, *xs = first.tensors(torch.float64 if backend == "reference" else torch.float32, device)
    others = second.tensors(weight.dtype, device)[2:]

    def gradient(*functions):
        leaf = weight.clone().requires_grad_()
        both = [y for run, images in zip(functions, (xs, others), strict=True) for y in run(leaf, bias, *images)]
        sum(y.sin().sum() for y in both).backward()
        return leaf.grad

    torch.testing.assert_close(gradient(first.ours, second.ours), gradient(first.reference, second.reference))


def test_a_level_that_no_loss_sees_sends_no_gradient(backend, device):
    pyramid = PYRAMIDS["leading"]
    weight, bias, *xs = (t.requires_grad_() for t in pyramid.tensors(torch.float32, device))
    ys = pyramid.ours(weight, bias, *xs)
    ys[1].sum().backward()
    assert xs[0].grad is None
    (gradient,) = torch.autograd.grad(pyramid.reference(weight, bias, xs[1])[0].sum(), weight)
    torch.testing.assert_close(weight.grad, gradient)


class Shaped(TorchDispatchMode):
    """Counts the tensors of one shape that are made inside."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.places = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.places += [t for t in (out if isinstance(out, tuple | list) else [out])
                        if isinstance(t, torch.Tensor) and t.shape == self.shape]  # fmt: skip
        return out


@pytest.mark.parametrize("inputs", [3, [4, 0, 2]], ids=["leading", "listed"])
def test_the_shared_weight_gets_one_dense_gradient_for_all_levels(backend, device, inputs):
    pyramid = PYRAMIDS["five"].of(inputs=inputs)
    weight, bias, *xs = (t.requires_grad_() for t in pyramid.tensors(torch.float32, device))
    total = sum(y.sum() for y in pyramid.ours(weight, bias, *xs))
    with Shaped(weight.shape) as made:
        torch.autograd.grad(total, [weight, bias, *xs])
    assert len({tensor.data_ptr() for tensor in made.places} - {weight.data_ptr()}) == 1


def test_relu_keeps_nan_and_passes_gradients_by_the_sign_of_the_output(backend, device):
    x = torch.tensor([-1.0, 2.0, torch.nan, 0.0], device=device).reshape(1, 1, 1, 4).requires_grad_()
    weight = torch.ones(1, 1, 1, 1, device=device)
    (y,) = elastic_conv2d_levels([x], weight, activation="relu")
    y.backward(torch.full_like(y, 3))
    torch.testing.assert_close(y, x.relu(), equal_nan=True)
    assert x.grad.flatten().tolist() == [0, 3, 3, 0]


def test_autocast_computes_in_low_precision_and_keeps_the_gradient_of_the_master(backend, device):
    pyramid = PYRAMIDS["leading"]
    tensors = pyramid.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        found, douts = results(pyramid.ours, tensors)
    exact, _ = results(pyramid.reference, [t.double() for t in tensors], douts)
    for name, value in exact.items():
        assert found[name].dtype == (torch.bfloat16 if name[0] == "y" else torch.float32)
        assert (found[name] - value).abs().max() <= 2**-5 * value.abs().max(), name


@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_autocast_leaves_levels_in_float64(device, master):
    pyramid = PYRAMIDS["listed"]
    weight, bias, *xs = pyramid.tensors(torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        ys = pyramid.ours(weight.to(master), bias.to(master), *xs)
    expected = pyramid.reference(weight.to(master).double(), bias.to(master).double(), *xs)
    torch.testing.assert_close(ys, expected)


def test_a_master_in_fp32_serves_levels_in_half_precision(backend, device):
    pyramid = PYRAMIDS["wide"]
    weight, bias, *xs = pyramid.tensors(torch.float32, device)
    weight, bias, xs = weight.requires_grad_(), bias.requires_grad_(), [x.bfloat16() for x in xs]
    ys = pyramid.ours(weight, bias, *xs)
    sum(y.float().sum() for y in ys).backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    for y, exact in zip(ys, pyramid.reference(weight, bias, *(x.float() for x in xs)), strict=True):
        assert y.dtype == torch.bfloat16 and (y - exact).abs().max() <= 2**-6 * exact.abs().max()


@by_dynamo
@pytest.mark.parametrize("name", ["leading", "centre-listed"])
def test_a_fixed_subnet_compiles_into_one_graph(backend, device, name):
    torch._dynamo.reset()
    pyramid = PYRAMIDS[name]
    tensors = pyramid.tensors(torch.float32, device)
    expected, douts = results(pyramid.ours, tensors)
    compiled = torch.compile(pyramid.ours, fullgraph=True, backend="aot_eager")
    for name, value in results(compiled, tensors, douts)[0].items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("name", ["leading", "centre-listed"])
def test_operators_pass_opcheck(backend, device, name):
    pyramid = PYRAMIDS[name]
    problem = pyramid.problem
    weight, bias, *xs = pyramid.tensors(torch.float32, device)
    lists = (problem.inputs, problem.outputs)
    indices = [torch.tensor(value, device=device) if isinstance(value, list) else None for value in lists]
    kernel = [full - 2 * less for full, less in zip(problem.weight[2:], problem.crop, strict=True)]
    tail = (*indices, len(problem.rows), kernel, [1, 1])
    forward, backward = torch.ops.jdkd.elastic_levels_fwd.default, torch.ops.jdkd.elastic_levels_bwd.default
    torch.library.opcheck(forward, (xs, weight, bias, *tail, pyramid.relu))
    douts = [torch.ones_like(y) for y in forward(xs, weight, bias, *tail, pyramid.relu)]
    for wanted in ([True, True, bias is not None], [False, True, False], [True, False, False]):
        torch.library.opcheck(backward, (douts, xs, weight, *tail, wanted))


@pytest.mark.parametrize("name", ["leading", "centre-listed"])
def test_second_derivatives_of_the_composed_route(name):
    pyramid = PYRAMIDS[name]
    tensors = [t.requires_grad_() for t in pyramid.tensors(torch.float64, "cpu")]
    assert torch.autograd.gradcheck(pyramid.ours, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(pyramid.ours, tensors, fast_mode=True)


def test_gradients_of_the_operator_route_are_exact():
    pyramid = Pyramid(Problem([3, 0], [5, 1, 6]), sizes=((1, 4, 4), (2, 3, 3)))
    weight, bias, *xs = (t.requires_grad_() for t in pyramid.tensors(torch.float64, "cpu"))
    tail = (torch.tensor([3, 0]), torch.tensor([5, 1, 6]), 3, (3, 3), (1, 0), True)
    assert torch.autograd.gradcheck(lambda w, b, *xs: _ElasticLevels.apply(w, b, *tail, *xs), (weight, bias, *xs))
    first = torch.autograd.grad(
        _ElasticLevels.apply(weight, bias, *tail, *xs)[0].square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_functional_transforms_see_through_the_composed_route():
    pyramid = PYRAMIDS["leading"]
    weight, bias, *xs = pyramid.tensors(torch.float64, "cpu")
    found, _ = results(pyramid.ours, [weight, bias, *xs], [torch.ones(2, 4, h, w) for _, h, w in pyramid.sizes])
    gradient = torch.func.grad(lambda w: sum(y.sum() for y in pyramid.ours(w, bias, *xs)))(weight)
    torch.testing.assert_close(gradient, found["dweight"])


def test_padding_by_name(backend, device):
    xs = [torch.randn(1, 3, size, size, device=device) for size in (6, 4)]
    weight = torch.randn(5, 3, 3, 3, device=device)
    for padding, pixels in (("same", 1), ("valid", 0)):
        for x, y in zip(xs, elastic_conv2d_levels(xs, weight, out_channels=2, padding=padding), strict=True):
            torch.testing.assert_close(y, F.conv2d(x, weight[:2], padding=pixels))
    centre = elastic_conv2d_levels(xs, weight, kernel_size=1, padding="same")
    torch.testing.assert_close(centre[0], elastic_conv2d(xs[0], weight, kernel_size=1, padding="same"))


def test_the_kernel_is_opt_in():
    weight, bias, *xs = (t.requires_grad_() for t in PYRAMIDS["all"].tensors(torch.float32, "cpu"))
    assert all("Convolution" in y.grad_fn.name() for y in PYRAMIDS["all"].ours(weight, bias, *xs))
    with use_backend("reference"):
        assert "Convolution" in PYRAMIDS["all"].ours(weight, bias, *xs)[0].grad_fn.name()


X = torch.zeros(1, 5, 4, 4)


@pytest.mark.parametrize(
    ("xs", "arguments", "words"),
    [
        ([], {}, ["no level", "list of levels"]),
        (X, {}, ["single tensor", "list"]),
        ([X, X.double()], {}, ["level 1", "float64", "float32", "one dtype"]),
        ([X, X.to("meta")], {}, ["level 1", "meta", "cpu", "one device"]),
        ([X[0]], {}, ["level 0", "3-dimensional"]),
        ([X.long()], {}, ["level 0", "int64"]),
        ([X.to("meta")] * 2, {}, ["levels are on meta", "weight on cpu"]),
        ([X, X[:, :4]], {}, ["level 1 has 4 channels", "5 input channels"]),
        ([X, X[..., :2]], {}, ["level 1 is 4x2", "3x3 kernel", "padding=(0, 0)"]),
        ([X], {"in_channels": 6}, ["in_channels", "6", "5"]),
        ([X], {"out_channels": [7]}, ["out_channels", "7", "0 to 6"]),
        ([X], {"kernel_size": 2}, ["kernel_size=2", "3x3"]),
        ([X], {"kernel_size": 1}, ["1, 1 pixels less", "padding=0"]),
        ([X], {"padding": -1}, ["padding=-1", "0"]),
        ([X], {"padding": "full"}, ["padding='full'", "same"]),
        ([X], {"activation": "gelu"}, ["activation='gelu'", "none, relu"]),
    ],
)
def test_refuses_what_does_not_fit(xs, arguments, words):
    with pytest.raises(InputError) as caught:
        elastic_conv2d_levels(xs, torch.zeros(7, 5, 3, 3), **arguments)
    for word in words:
        assert word in str(caught.value)
