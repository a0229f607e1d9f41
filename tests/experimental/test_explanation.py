"""What a layer says of the kernel that its next forward takes, and that the forward takes it."""

import pytest
import torch
from torch import nn

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.experimental import ElasticConvBNAct, ElasticLevelsConv2d, explain, packed
from jdkd.nn import ElasticConv2d, ElasticLinear
from tests.dispatched import Dispatched

OP = "elastic_conv"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter
OPERATOR = {"pointwise": "elastic_pointwise_fwd", "implicit_gemm": "elastic_conv_fwd", "aten": "convolution"}
CONVOLUTIONS = {
    "1x1": ({"kernel_size": 1}, (5, 4), "pointwise"),
    "1x1 listed": ({"kernel_size": 1}, (5, [4, 0]), "implicit_gemm"),
    "centre": ({"kernel_size": 3, "padding": 1}, (5, 4, 1), "pointwise"),
    "3x3": ({"kernel_size": 3, "padding": 1}, (5, [4, 0]), "implicit_gemm"),
    "reflect": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 4), "implicit_gemm"),
    "same": ({"kernel_size": 3, "padding": "same"}, (5, 4), "aten"),
    "depthwise": ({"kernel_size": 3, "groups": 8}, (5, None), "aten"),
    "transform": ({"kernel_size": 5, "padding": 2, "kernel_transform": True}, (5, 4, 3), "aten"),
}
convolutions = pytest.mark.parametrize(
    ("options", "active", "kernel"), CONVOLUTIONS.values(), ids=[name.replace(" ", "-") for name in CONVOLUTIONS]
)


def _image(channels: int, device: str) -> torch.Tensor:
    return torch.randn(2, channels, 9, 8, device=device).contiguous(memory_format=torch.channels_last)


def _ran(layer: nn.Module, x: torch.Tensor) -> str:
    """The first operator of a convolution in a forward."""
    with torch.no_grad(), Dispatched() as dispatched:
        layer(x)
    return next(name for name in dispatched.names if name in OPERATOR.values())


@convolutions
def test_a_forward_takes_the_kernel_that_was_explained(backend, device, options, active, kernel):
    conv = ElasticConv2d(8, 8, **options).to(device)
    conv.set_active(*active)
    x = _image(5, device)
    found = explain(conv, x)
    assert found.kernel == (kernel if backend == "triton" else "aten")
    assert _ran(conv, x) == OPERATOR[found.kernel]
    assert found.kernel not in dict(found.others)


@convolutions
def test_an_evaluation_unit_takes_the_kernel_that_was_explained(backend, device, options, active, kernel):
    unit = ElasticConvBNAct(8, 8, **options).to(device)
    unit.set_active(*active)
    x = _image(5, device)
    for training in (True, False):
        unit.train(training)
        found = explain(unit, x)
        assert _ran(unit, x) == OPERATOR[found.kernel]
        assert ("by themselves" in found.why) == training
    if kernel == "pointwise" and backend == "triton":
        assert "normalisation, residual and ReLU too" in found.why


@pytest.mark.parametrize("transform", [False, True], ids=["centre", "transform"])
def test_a_forward_of_levels_takes_the_kernel_that_was_explained(backend, device, transform):
    head = ElasticLevelsConv2d(8, 8, 5, padding=2, activation="relu", kernel_transform=transform).to(device)
    head.set_active(5, [4, 0], 3)
    levels = {"p3": _image(5, device), "p4": _image(5, device)[..., :4, :4]}
    found = explain(head, levels)
    assert found.kernel == ("elastic_levels" if backend == "triton" else "aten")
    with torch.no_grad(), Dispatched() as dispatched:
        head(levels)
    assert ("elastic_levels_fwd" in dispatched.names) == (found.kernel == "elastic_levels")
    assert len(found.others) == 1 and found.kernel not in dict(found.others)
    assert "2 levels, 5->2 listed channels, 3x3 kernel" in found.call and "176 positions" in found.call
    assert ("transform" in found.why) == transform


def test_shapes_of_levels_will_do():
    head, level = ElasticLevelsConv2d(8, 8, 3), torch.empty(1, 8, 100, 100, device="meta")
    assert explain(head, [level, level]).others == (("elastic_levels", "it takes tensors on cuda or cpu"),)
    assert ": 1 level, 8->8" in explain(head, torch.zeros(1, 8, 5, 5)).call


def test_filters_larger_than_the_output_leave_a_unit_in_parts():
    unit = ElasticConvBNAct(8, 8, 3, padding=1).eval()
    assert "take the scale" in explain(unit, _image(8, "cpu")).why
    assert "by themselves" in explain(unit, _image(8, "cpu")[:, :, :1, :1]).why


def test_explaining_computes_nothing(device):
    conv = ElasticConv2d(8, 8, 3, padding=1).to(device)
    unit = ElasticConvBNAct(8, 8, 1).to(device).eval()
    x = _image(8, device)
    with Dispatched() as dispatched:
        explain(conv, x)
        explain(unit, x)
        explain(ElasticLinear(8, 3), torch.empty(2, 8, device="meta"))
    assert not {name for name in dispatched.names if name.startswith(("conv", "elastic", "linear", "_to_copy"))}


def test_a_shape_will_do():
    conv = ElasticConv2d(8, 8, 3)
    assert explain(conv, torch.empty(1, 8, 1000, 1000, device="meta")).kernel == "aten"


def test_the_lines_can_be_read():
    conv = ElasticConv2d(64, 128, 1)
    conv.set_active(32, [5, 100])
    with use_backend("reference"):
        lines = str(explain(conv, torch.zeros(2, 32, 7, 5))).splitlines()
    assert lines[0] == (
        "ElasticConv2d: 32->2 listed channels, 1x1 kernel, stride 1x1, padding 0x0, groups 1, 70 positions, float32, "
        "not channels-last, on cpu"
    )
    assert [line.split(":")[0] for line in lines[1:]] == ["aten", "not pointwise", "not implicit_gemm", "not matmul"]
    assert lines[2].endswith("it takes leading channels") and lines[3].endswith("reference was asked for")


@pytest.mark.parametrize("kind", [ElasticConv2d, ElasticLevelsConv2d, ElasticConvBNAct, ElasticLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_says_the_dtype_that_autocast_computes_in(kind, dtype):
    layer = (kind(8, 8) if kind is ElasticLinear else kind(8, 8, 1)).to(dtype).eval()
    x = torch.randn((2, 8) if kind is ElasticLinear else (2, 8, 3, 3), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        computed = layer(x).dtype
        assert str(computed).removeprefix("torch.") in explain(layer, x).call
    assert computed == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


def test_an_explanation_cannot_be_changed():
    found = explain(ElasticLinear(8, 3), torch.zeros(2, 8))
    assert (found.kernel, found.others) == ("aten", ()) and "8->3 features" in str(found)
    with pytest.raises(AttributeError):
        found.kernel = "another"
    assert hash(found) == hash(explain(ElasticLinear(8, 3), torch.zeros(2, 8)))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (ElasticConv2d(8, 8, 3), torch.zeros(1, 7, 5, 5)),
        (ElasticConvBNAct(8, 8, 3), torch.zeros(1, 7, 5, 5)),
        (ElasticConvBNAct(8, 8, 3).eval(), torch.zeros(1, 7, 5, 5)),
        (ElasticLinear(8, 3), torch.zeros(2, 7)),
        (ElasticLevelsConv2d(8, 8, 3), [torch.zeros(1, 8, 5, 5), torch.zeros(1, 7, 5, 5)]),
        (ElasticLevelsConv2d(8, 8, 3), {}),
        (ElasticLevelsConv2d(8, 8, 3), torch.zeros(1, 8, 2, 5)),
    ],
    ids=["conv", "unit", "unit-eval", "linear", "levels", "no level", "small level"],
)
def test_refuses_an_input_as_the_forward_does(layer, x):
    with pytest.raises(InputError) as of_forward:
        layer(x)
    with pytest.raises(InputError) as of_explanation:
        explain(layer, x)
    assert str(of_explanation.value) == str(of_forward.value)


def test_refuses_a_backend_as_the_forward_does(device):
    conv = ElasticConv2d(8, 8, 1, device=device)
    for ask in (conv, lambda x: explain(conv, x)):
        with use_backend("cuda"), pytest.raises(InputError, match="no backend 'cuda'"):
            ask(_image(8, device))


def test_a_plain_layer_has_no_kernels():
    with pytest.raises(InputError, match="no kernels for Conv2d; give ElasticConvBNAct, ElasticLevelsConv2d, "):
        explain(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 1, 1))


def test_packed_lists_count_as_leading_channels():
    conv = ElasticConv2d(8, 8, 1)
    conv.set_active(5, [4, 0])
    x = _image(5, "cpu")
    with torch.no_grad(), use_backend("triton"):
        assert explain(conv, x).kernel == "implicit_gemm"
        with packed(conv):
            assert explain(conv, x).kernel == "pointwise"
            assert _ran(conv, x) == OPERATOR["pointwise"]
