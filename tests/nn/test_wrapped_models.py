"""A supernet inside the wrappers of torch, under its tracers, and without memory."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from jdkd.errors import InputError
from jdkd.experimental import (
    ElasticConvBNAct,
    ElasticLevelsConv2d,
    LevelsConv2d,
    compile_elastic,
    explain,
    masked,
    pack_forwards,
    packed,
    score_candidates,
)
from jdkd.nn import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear, Subnet, export, set_subnet
from tests.nn.elastic_models import SMALL, Net, elastic_blocks, images, randomised, supernet

pytestmark = [  # both by dynamo
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
LISTED = Subnet(**SMALL)
WRAPPERS = {
    "average": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": DataParallel,
    "average of compiled": lambda model: AveragedModel(torch.compile(model, backend="eager")),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@wrappers
def test_a_wrapped_supernet_is_set_exported_and_packed(wrap):
    wrapper, plain = wrap(supernet()), supernet()
    set_subnet(wrapper, LISTED)
    set_subnet(plain, LISTED)
    expected = plain(images())
    torch.testing.assert_close(wrapper(images()), expected)
    assert type(export(wrapper)) is Net
    torch.testing.assert_close(export(wrapper)(images()), expected)
    with packed(wrapper) as same:
        assert same is wrapper
        torch.testing.assert_close(wrapper(images()), expected)
    with pack_forwards(wrapper):
        torch.testing.assert_close(wrapper(images()), expected)


@wrappers
def test_a_wrapped_plain_model_is_masked_and_scored(wrap):
    plain, keep = randomised(Net()), {"stream": [6, 1, 2], "stage.0.inner": 2}
    plain.elastic_groups = supernet().elastic_groups
    with masked(plain, keep):
        expected = plain(images())
    wrapper = wrap(plain)
    with masked(wrapper, keep, skip=[]) as same:
        assert same is wrapper
        torch.testing.assert_close(wrapper(images()), expected)
    (found,) = score_candidates(wrapper, [keep], images())
    torch.testing.assert_close(found, expected)


def test_a_wrapped_layer_is_explained_and_a_wrapped_model_compiled():
    layer = ElasticConv2d(3, 8, 1)
    assert explain(DataParallel(layer), images()) == explain(layer, images())
    net = compile_elastic(DataParallel(supernet()), backend="eager")
    assert net.module.stage[0]._compiled_call_impl is not None and net._compiled_call_impl is None
    set_subnet(net, Subnet(**SMALL, depths={"stage": 1}))  # one block is compiled
    torch.testing.assert_close(net(images()), export(net)(images()))


PLAIN = {
    ElasticConv2d: nn.Conv2d,
    ElasticLevelsConv2d: nn.Conv2d,
    LevelsConv2d: nn.Conv2d,
    ElasticLinear: nn.Linear,
    ElasticBatchNorm2d: nn.BatchNorm2d,
}


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_signatures_are_torchs_with_what_is_ours_by_name(kind):
    ours = inspect.signature(kind).parameters
    theirs = inspect.signature(PLAIN[kind]).parameters
    shared = [*ours.values()][: len(theirs)]
    assert [(p.name, p.kind, p.default) for p in shared] == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert all(p.kind is p.KEYWORD_ONLY for p in [*ours.values()][len(theirs) :])


@pytest.mark.parametrize("kind", [*PLAIN, ElasticConvBNAct], ids=lambda kind: kind.__name__)
def test_a_layer_is_built_without_being_initialised(kind):
    arguments = (4,) if kind is ElasticBatchNorm2d else (3, 4) if kind is ElasticLinear else (3, 4, 3)
    layer = nn.utils.skip_init(kind, *arguments, dtype=torch.float64)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    layer.load_state_dict(kind(*arguments, dtype=torch.float64).state_dict())


def _tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def test_a_functional_call_puts_weights_into_a_model_without_memory():
    net, x = supernet(), images()
    with torch.device("meta"):
        built = Net(ElasticConv2d, ElasticBatchNorm2d, ElasticLinear, elastic_blocks).eval()
    built.elastic_groups = net.elastic_groups
    set_subnet(net, LISTED)
    moved = copy.deepcopy(net).to("meta")
    set_subnet(built, LISTED)
    for model in (moved, built):
        torch.testing.assert_close(functional_call(model, _tensors(net), (x,), strict=True), net(x), rtol=0, atol=0)
        assert model(x.to("meta")).is_meta
    assert functional_call(net, _tensors(moved), (x.to("meta"),)).shape == net(x).shape


def _through_a_file(net: nn.Module, **options) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "file": _through_a_file,
    "file on meta": lambda net: _through_a_file(net, map_location="meta").to_empty(device="cpu"),
    "meta": lambda net: copy.deepcopy(net).to("meta").to_empty(device="cpu"),
    "double and back": lambda net: copy.deepcopy(net).double().float(),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("trained", [False, True], ids=["set", "run"])
def test_listed_channels_go_wherever_a_model_goes(copied, trained):
    net, x = supernet(), images()
    set_subnet(net, LISTED)
    if trained:
        net(x).sum().backward()
    other = copied(net)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    set_subnet(other, Subnet({"stream": [3, 1]}))
    torch.testing.assert_close(other(x), export(other)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_listed_channels_run_in_another_dtype(dtype):
    net = supernet()
    set_subnet(net, LISTED)
    net.to(dtype)
    torch.testing.assert_close(net(images().to(dtype)), export(net)(images().to(dtype)))


class Unit(nn.Module):
    """Runs a unit with a residual, and two levels."""

    def __init__(self, unit: nn.Module, levels: nn.Module):
        super().__init__()
        self.unit, self.levels = unit, levels

    def forward(self, x, residual):
        return self.levels({"p3": self.unit(x, residual), "p4": residual})["p3"]


def test_a_symbolic_trace_holds_elastic_layers_as_nodes_and_follows_the_subnet():
    net, x = supernet(), images()
    set_subnet(net, LISTED)
    traced = torch.fx.symbolic_trace(net)
    nodes = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert nodes == ["stem", "bn", "stage.0", "stage.1", "stage.2", "pool", "head"]
    for subnet in (LISTED, Subnet({"stream": 3}, depths={"stage": 1}), Subnet()):
        set_subnet(net, subnet)
        torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.fx.symbolic_trace(export(net))(x), net(x))


def test_units_and_levels_are_traced_too_and_plain_units_are_seen_through():
    unit, levels = randomised(ElasticConvBNAct(3, 4, 1)), ElasticLevelsConv2d(4, 5, 1)
    x, residual = torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4)
    expected = levels(unit(x, residual))
    for model in (Unit(unit, levels), Unit(unit.export(), levels.export())):
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x, residual), expected, rtol=1e-4, atol=1e-5)
    assert "unit.conv" in [node.target for node in traced.graph.nodes]


@pytest.mark.parametrize("kind", [ElasticConv2d, ElasticLinear])
def test_a_layer_that_is_no_part_of_a_model_is_not_traced(kind):
    with pytest.raises(InputError, match=f"torch.fx cannot trace {kind.__name__} by itself; trace a model that holds"):
        torch.fx.symbolic_trace(kind(3, 4, *[1] * (kind is ElasticConv2d)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is of one shape
def test_torchscript_takes_the_export_and_says_so_of_the_supernet():
    net, unit = supernet(), randomised(ElasticConvBNAct(3, 4, 1))
    set_subnet(net, LISTED)
    before = dict(net.named_modules())
    for model, name in ((net, "ElasticConv2d"), (nn.Sequential(unit), "ElasticConvBNAct")):
        with pytest.raises(InputError, match=rf"torch.jit.script cannot compile {name}, .* jdkd.nn.export\(model\)"):
            torch.jit.script(model)
    assert dict(net.named_modules()) == before
    torch.testing.assert_close(torch.jit.script(export(net))(images()), net(images()))
    x, residual = torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4)
    scripted = torch.jit.script(unit.export())
    torch.testing.assert_close(scripted(x, residual), unit(x, residual), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(net, (images(),))(images()), net(images()))
    with pytest.raises(InputError, match=r"torch.jit.script cannot compile LevelsConv2d"):
        torch.jit.script(LevelsConv2d(3, 4, 1))
