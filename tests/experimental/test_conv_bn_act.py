"""The fused evaluation unit: equal to its parts, within rounding, whatever is active."""

import copy

import pytest
import torch
from torch import nn

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.experimental import ConvBNAct, ElasticConvBNAct, explain
from jdkd.nn import ElasticGroups, Subnet, export, set_subnet
from jdkd.testing import assert_within_twice
from tests.dispatched import Dispatched

OP = "elastic_pointwise"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter
UNITS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1, "relu": False},
    "strided": {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 1},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 8},
    "transform": {"kernel_size": 5, "padding": 2, "kernel_transform": True},
}
units = pytest.mark.parametrize("options", UNITS.values(), ids=UNITS)
CHANNELS = {"all": (None, None), "leading": (5, 5), "listed": ([6, 0, 3], [6, 0, 3])}
channels = pytest.mark.parametrize("active", CHANNELS.values(), ids=CHANNELS)


def _unit(options: dict) -> ElasticConvBNAct:
    torch.manual_seed(0)
    unit = ElasticConvBNAct(8, 8, **options)
    with torch.no_grad():
        for vector in (unit.bn.weight, unit.bn.bias, unit.bn.running_mean, unit.bn.running_var):
            vector.uniform_(0.5, 2.0)
        for name, parameter in unit.conv.named_parameters():
            if name.startswith("transform"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    if options["kernel_size"] == 5:
        unit.set_active(kernel_size=3)
    return unit


def _activate(unit: ElasticConvBNAct, active: tuple) -> torch.Tensor:
    unit.set_active(*active, 3 if unit.conv.kernel_transform else None)
    return torch.randn(2, unit.conv.active_in_channels, 14, 13)


@units
@channels
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_unit_equals_its_parts(options, active, with_residual, training):
    unit = _unit(options)
    x = _activate(unit, active)
    plain = unit.train(training).export()
    assert type(plain) is ConvBNAct and type(plain.conv) is nn.Conv2d and type(plain.bn) is nn.BatchNorm2d
    residual = torch.randn(copy.deepcopy(plain).eval()(x).shape) if with_residual else None
    _assert_equals_its_parts(unit, plain, x, residual)
    rows = torch.arange(8)[: active[1]] if not isinstance(active[1], list) else torch.tensor(active[1])
    for ours, theirs in ((unit.bn.weight, plain.bn.weight), (unit.bn.bias, plain.bn.bias)):
        torch.testing.assert_close(ours.grad[rows], theirs.grad, rtol=1e-4, atol=1e-4)
        assert ours.grad.count_nonzero() <= len(rows)
    if options["kernel_size"] != 5 and "groups" not in options:
        at = (rows[:, None], rows)
        torch.testing.assert_close(unit.conv.weight.grad[at], plain.conv.weight.grad, rtol=1e-4, atol=1e-4)
        unit.conv.weight.grad[at] = 0
        assert not unit.conv.weight.grad.any(), "an inactive weight has a gradient"


def _assert_equals_its_parts(unit: nn.Module, plain: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Holds output and gradients of a unit to the 2x rule; the plain one gets its gradients too."""
    exact = copy.deepcopy(plain).double()
    dout = torch.randn(copy.deepcopy(plain).eval()(x).shape)
    found = {}
    for name, module, dtype in (("ours", unit, x.dtype), ("eager", plain, x.dtype), ("exact", exact, torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, residual) if t is not None]
        y = module(*leaves)
        y.backward(dout.to(dtype))
        found[name] = [y.detach(), *(leaf.grad for leaf in leaves)]
    for i, what in enumerate(["y", "dx", "dresidual"][: len(found["ours"])]):
        assert_within_twice(*(found[name][i] for name in ("ours", "eager", "exact")), what=what)


def test_evaluation_makes_no_pass_for_the_normalisation():
    unit = _unit(UNITS["3x3"]).eval()
    x, residual = _activate(unit, (5, 5)), torch.randn(2, 5, 14, 13)
    with Dispatched() as dispatched, torch.no_grad():
        unit(x, residual)
    assert not any("batch_norm" in name for name in dispatched.names)
    assert dispatched.names[-3:] == ["convolution", "add_", "relu_"]
    with Dispatched() as dispatched, torch.no_grad():
        unit(x[:, :, :1, :1])
    assert any("batch_norm" in name for name in dispatched.names), "filters larger than the output stay as they are"


POINTWISE = {
    "plain": ({"kernel_size": 1, "relu": False}, (5, 5)),
    "strided": ({"kernel_size": 1, "stride": 2}, (8, 3)),
    "centre": ({"kernel_size": 3, "padding": 1}, (5, 7, 1)),
}
pointwise = pytest.mark.parametrize(("options", "active"), POINTWISE.values(), ids=POINTWISE)


@pointwise
@pytest.mark.parametrize("residual", ["none", "like", "broadcast", "wider"])
def test_one_pass_equals_the_parts(backend, device, options, active, residual):
    unit = _unit(options).eval()
    unit.set_active(*active)
    plain = unit.export()
    x = torch.randn(2, unit.conv.active_in_channels, 9, 8).contiguous(memory_format=torch.channels_last)
    y = plain(x)
    residuals = {"none": None, "like": torch.randn_like(y), "broadcast": torch.randn_like(y[:, :1, :1])}
    residuals["wider"] = torch.randn_like(y).double()
    given, plain = residuals[residual], plain.to(device)
    x, given, unit = x.to(device), None if given is None else given.to(device), unit.to(device)
    if residual == "wider":
        torch.testing.assert_close(unit(x, given), plain(x, given), rtol=1e-5, atol=1e-5)
        return
    _assert_equals_its_parts(unit, plain, x, given)
    for ours, theirs in ((unit.bn.weight, plain.bn.weight), (unit.bn.bias, plain.bn.bias)):
        torch.testing.assert_close(ours.grad[: len(theirs)], theirs.grad, rtol=1e-4, atol=1e-4)
        assert not ours.grad[len(theirs) :].any()
    spare = (options["kernel_size"] - unit.conv.active_kernel_size[0]) // 2
    active_weight = (*(slice(count) for count in plain.conv.weight.shape[:2]), spare, spare)
    gradient = unit.conv.weight.grad
    torch.testing.assert_close(gradient[active_weight], plain.conv.weight.grad[..., 0, 0], rtol=1e-4, atol=1e-4)
    gradient[active_weight] = 0
    assert not gradient.any(), "an inactive weight has a gradient"


@pointwise
def test_evaluation_is_one_operator_where_the_product_takes_all(backend, device, options, active):
    unit = _unit(options).eval().to(device)
    unit.set_active(*active)
    x = torch.randn(2, unit.conv.active_in_channels, 9, 8, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Dispatched() as dispatched:
        y = unit(x)
    with torch.no_grad(), Dispatched() as joined:
        unit(x, torch.zeros_like(y))
    for names in (dispatched.names, joined.names):
        ran = [name for name in names if name in ("elastic_pointwise_fwd", "convolution", "add_", "relu_")]
        assert ran == ["elastic_pointwise_fwd"] or backend == "reference"
    assert ("elastic_pointwise_fwd" in dispatched.names) == (backend == "triton")


def test_listed_channels_and_training_keep_their_route(backend, device):
    unit = _unit({"kernel_size": 1}).to(device)
    x = torch.randn(2, 8, 9, 8, device=device).contiguous(memory_format=torch.channels_last)
    for training, active in ((True, (None, 5)), (False, (None, [6, 1]))):
        unit.train(training).set_active(*active)
        plain = unit.export()
        torch.testing.assert_close(unit(x), plain(x), rtol=1e-5, atol=1e-5)
        assert unit(x).is_contiguous(memory_format=torch.channels_last)


def test_autocast_in_one_pass_computes_as_the_parts_do(backend, device):
    unit = _unit({"kernel_size": 1}).eval().to(device)
    unit.set_active(5, 7)
    x = torch.randn(2, 5, 9, 8, device=device).contiguous(memory_format=torch.channels_last)
    residual, plain = torch.randn(2, 7, 9, 8, device=device), unit.export()
    with torch.autocast(device, torch.bfloat16):
        for other in (residual, residual.bfloat16()):
            with use_backend("reference"):
                expected = plain(x, other)
            y = unit(x, other)
            assert y.dtype == expected.dtype
            torch.testing.assert_close(y.float(), expected.float(), rtol=2**-5, atol=2**-5)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")  # by dynamo
def test_one_pass_compiles_into_one_graph(backend, device):
    torch._dynamo.reset()
    unit = _unit({"kernel_size": 1}).eval().to(device)
    unit.set_active(5, 7)
    x = torch.randn(2, 5, 9, 8, device=device).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.compile(unit, fullgraph=True, backend="aot_eager")(x), unit(x))


def test_a_frozen_normalisation_folds_while_the_model_trains():
    unit = _unit(UNITS["3x3"]).train()
    unit.bn.eval()
    x = _activate(unit, (None, [1, 7]))
    before = copy.deepcopy(unit.bn.state_dict())
    torch.testing.assert_close(unit(x), unit.export()(x))
    for name, tensor in unit.bn.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_unit_keeps_its_dtype(dtype):
    unit = _unit(UNITS["3x3"]).eval().to(dtype)
    x = _activate(unit, (5, 5)).to(dtype)
    y = unit(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(unit.export()).double()(x.double())
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-13
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_autocast_computes_as_the_parts_do():
    unit = _unit(UNITS["3x3"]).eval()
    x = _activate(unit, (None, [1, 7, 4]))
    residual = torch.randn(2, 3, 14, 13)
    plain = unit.export()
    with torch.autocast("cpu", torch.bfloat16):
        for other in (residual, residual.bfloat16()):
            y, expected = unit(x, other), plain(x, other)
            assert y.dtype == expected.dtype
            torch.testing.assert_close(y.float(), expected.float(), rtol=2**-5, atol=2**-5)


def test_a_model_of_units_switches_and_exports():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = _unit(UNITS["3x3"]), _unit(UNITS["1x1"])

        def forward(self, x):
            return self.second(self.first(x), x)

    model = Pair().eval()
    model.elastic_groups = ElasticGroups(
        {"inner": [("first.conv", "out"), ("first.bn", "out"), ("second.conv", "in")]}, {}
    )
    set_subnet(model, Subnet({"inner": [7, 2, 4]}))
    assert (model.first.conv.active_out_channels, model.first.bn.active_channels) == (3, 3)
    plain, x = export(model), torch.randn(2, 8, 9, 9)
    assert type(plain.first) is ConvBNAct and plain.first.conv.weight.shape == (3, 8, 3, 3)
    assert not plain.training and not plain.first.training
    torch.testing.assert_close(plain(x), model(x))
    assert plain.state_dict().keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")  # by dynamo
@channels
def test_the_unit_compiles_into_one_graph(active):
    torch._dynamo.reset()
    unit = _unit(UNITS["3x3"]).eval()
    x = _activate(unit, active)
    torch.testing.assert_close(torch.compile(unit, fullgraph=True, backend="aot_eager")(x), unit(x))


def test_refuses_what_does_not_fit_and_stays_as_it_was():
    unit = _unit(UNITS["3x3"]).eval()
    unit.set_active(4, 6)
    before = repr(unit)
    for chosen, words in (({"out_channels": 9}, "asks for 9 channels"), ({"kernel_size": 2}, "kernel_size=2")):
        with pytest.raises(InputError, match=rf"ElasticConvBNAct.set_active: .*{words}"):
            unit.set_active(**chosen)
        assert repr(unit) == before
    with pytest.raises(InputError, match="x has 5 channels but 4 input channels are active"):
        unit(torch.zeros(1, 5, 4, 4))
    unit.bn.set_active(5)
    with pytest.raises(InputError, match="conv makes 6 channels and bn has 5 active"):
        unit(torch.zeros(1, 4, 9, 9))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("width", [5, 8])
def test_refuses_a_synchronised_normalisation(width, training):
    unit = _unit(UNITS["3x3"]).train(training)
    unit.set_active(width, width)
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(export(unit))
    assert type(plain.bn) is nn.SyncBatchNorm and plain.bn.num_features == width
    unit, x = nn.SyncBatchNorm.convert_sync_batchnorm(unit), torch.zeros(1, width, 4, 4)
    calls = [lambda: unit(x), lambda: unit.set_active(4), unit.export, lambda: export(unit), lambda: explain(unit, x)]
    for call in calls:
        with pytest.raises(InputError, match=r"ElasticConvBNAct: bn is a SyncBatchNorm and no .*jdkd.nn.export"):
            call()
