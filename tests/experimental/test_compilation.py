"""A supernet that is compiled once: how often the compiler ran over many subnets, and that what it made is right."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import jdkd.nn
from jdkd.errors import InputError
from jdkd.experimental import ElasticConvBNAct, compile_elastic, pack_forwards, packed
from jdkd.nn import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticGroups,
    ElasticLinear,
    Subnet,
    as_elastic_block,
    export,
    set_subnet,
)
from tests.experimental.packing_cases import launches
from tests.nn.elastic_models import BLOCKS, images, randomised, supernet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning"),  # by dynamo
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # by dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*is deprecated:DeprecationWarning"),  # by inductor
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),  # by eager
]
CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1, "stride": 2},
    "uneven": {"kernel_size": (4, 5), "padding": (3, 4), "dilation": 2, "bias": False},
    "same": {"kernel_size": (4, 5), "padding": "same"},
    "valid": {"kernel_size": 1, "padding": "valid"},
    "reflect": {"kernel_size": 5, "padding": (2, 3), "padding_mode": "reflect"},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 12},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 4},
    "transform": {"kernel_size": 5, "padding": 2, "kernel_transform": True},
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _counted(model: nn.Module, backend: str = "eager", **options) -> CompileCounterWithBackend:
    """Compiles a model with a backend that counts."""
    counter = CompileCounterWithBackend(backend)
    compile_elastic(model, backend=counter, **options)
    return counter


def _drawn(number: int, *, depth: int | None = None, listed: bool = True) -> list[Subnet]:
    """Subnets of the small supernet: other widths, lists and kernel sizes for each, two channels at least."""
    draw, subnets = random.Random(0), []
    for _ in range(number):
        channels = {}
        for group, size in [("stream", 8), *((f"{block}.inner", 6) for block in BLOCKS)]:
            count = draw.randint(2, size)
            channels[group] = draw.sample(range(size), count) if listed and draw.random() < 0.5 else count
        kernels = {f"{block}.conv1": draw.choice([1, 3, 5]) for block in BLOCKS}
        subnets.append(Subnet(channels, kernels, {"stage": depth or draw.randint(1, 3)}))
    return subnets


def _step(model: nn.Module, *subnets: Subnet, x: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Outputs, gradients and statistics of one backward of several subnets."""
    model.zero_grad()
    found = {}
    for number, subnet in enumerate(subnets):
        set_subnet(model, subnet)
        found[f"output {number}"] = model(images() if x is None else x)
    if any(parameter.requires_grad for parameter in model.parameters()):
        sum(y.square().sum() for y in found.values()).backward()
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_twenty_subnets_compile_a_block_once():
    net, eager = supernet().train(), supernet().train()
    counter = _counted(net, "aot_eager", fullgraph=True)
    for subnet in _drawn(20, depth=1):
        _assert_same(_step(net, subnet), _step(eager, subnet))
        assert counter.frame_count == 1


def test_a_depth_compiles_the_blocks_that_had_not_run():
    net, eager = supernet(), supernet()
    counter, deepest = _counted(net), 0
    for depth in (1, 1, 3, 2, 1, 3):  # in evaluation
        deepest = max(depth, deepest)
        for subnet in _drawn(3, depth=depth):
            _assert_same(_step(net, subnet), _step(eager, subnet))
            assert counter.frame_count == deepest


def test_a_first_compile_takes_equal_widths_for_no_rule():
    net, eager = supernet(), supernet()
    counter = _counted(net)
    for stream, inner in ((6, 6), (5, 5), (6, 3), (4, 6), (8, 2)):
        subnet = Subnet({"stream": stream, "stage.0.inner": inner}, depths={"stage": 1})
        _assert_same(_step(net, subnet), _step(eager, subnet))
    assert counter.frame_count == 1


def test_one_channel_is_right_at_a_compile_more():
    net, eager = supernet(), supernet()
    counter = _counted(net)
    for inner in (4, 1, 3, [2], [5, 1], 1):
        subnet = Subnet({"stage.0.inner": inner}, depths={"stage": 1})
        _assert_same(_step(net, subnet), _step(eager, subnet))
    assert counter.frame_count == 2


def test_another_image_size_costs_one_compile_for_all_sizes():
    net, eager = supernet(), supernet()
    counter = _counted(net)
    for size, subnet in zip((6, 9, 7, 12), _drawn(4, depth=1), strict=True):
        x = torch.randn(2, 3, size, size + 1)
        _assert_same(_step(net, subnet, x=x), _step(eager, subnet, x=x))
    assert counter.frame_count == 2


def test_two_subnets_share_one_backward():
    net, eager = supernet(), supernet()
    _counted(net, "aot_eager")
    for first, second in itertools.pairwise(_drawn(4, depth=1)):
        _assert_same(_step(net, first, second), _step(eager, first, second))


def test_inductor_compiles_it():
    net = nn.Sequential(ElasticConv2d(3, 8, 3, bias=False), ElasticBatchNorm2d(8), nn.ReLU())  # few kernels in C++
    net.elastic_groups = ElasticGroups({"inner": [("0", "out"), ("1", "out")]})
    eager = copy.deepcopy(randomised(net).train())  # in training, both
    counter = _counted(net, "inductor", fullgraph=True)
    for inner in (8, 5, [6, 1, 2], [7, 3], 3):
        subnet = Subnet({"inner": inner})
        _assert_same(_step(net, subnet), _step(eager, subnet))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_is_right_whatever_is_active(name):
    options = CONVOLUTIONS[name]
    layout = torch.channels_last if name in ("3x3", "reflect") else torch.contiguous_format
    torch.manual_seed(0)
    net = nn.Sequential(ElasticConv2d(12, 12, **options), nn.Softplus())
    for key, parameter in net.named_parameters():
        if "transform" in key:
            nn.init.normal_(parameter, std=0.3)
    eager = copy.deepcopy(net)
    counter = _counted(net, "aot_eager", fullgraph=True)
    size = net[0].kernel_size
    smaller = [tuple(max(k - less, (k - 1) % 2 + 1) for k in size) for less in (0, 2, 4)]
    several = options.get("groups", 1) == 4
    for number, count in enumerate((12, 6, 9, 3)):
        channels = count if several or number % 2 else list(range(12))[::-1][:count]
        for kernel in smaller:
            grads = []
            x = torch.randn(2, count, 11, 12).contiguous(memory_format=layout)
            for model in (net, eager):
                model[0].set_active(channels, channels, kernel)
                leaf = x.clone().requires_grad_()
                y = model(leaf)
                found = torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()], allow_unused=True)
                pairs = zip((leaf, *model.parameters()), found, strict=True)
                grads.append([y, *(torch.zeros_like(p) if grad is None else grad for p, grad in pairs)])
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert counter.frame_count == 1


def test_a_head_of_units_and_linear_layers_is_one_region():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit, self.linear = ElasticConvBNAct(6, 8, 5, padding=2), ElasticLinear(8, 4)

        def forward(self, x):
            return self.linear(self.unit(x, x[:, :1]).mean((2, 3)))

    head = randomised(Head())
    head.elastic_groups = ElasticGroups({"inner": [("unit.conv", "out"), ("unit.bn", "out"), ("linear", "in")]})
    eager, x = copy.deepcopy(head), torch.randn(2, 6, 5, 5)
    counter = _counted(head, "aot_eager", fullgraph=True)
    for inner, kernel in ((8, 5), (3, 1), ([7, 2], 3), (5, 5)):
        subnet = Subnet({"inner": inner}, {"unit.conv": kernel})
        _assert_same(_step(head, subnet, x=x), _step(eager, subnet, x=x))
    assert counter.frame_count == 1


def test_a_plain_compile_is_right_too():
    net, eager = supernet(), supernet()
    compiled = torch.compile(net, backend="aot_eager")
    for subnet in _drawn(2, depth=1):
        set_subnet(net, subnet)
        compiled(images()).square().sum().backward()
        set_subnet(eager, subnet)
        eager(images()).square().sum().backward()
    for ours, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_reset_forgets_what_was_compiled_and_nothing_else():
    net, eager = supernet(), supernet()
    counter = _counted(net)
    for expected in (1, 2):
        for subnet in _drawn(2, depth=1):
            _assert_same(_step(net, subnet), _step(eager, subnet))
        assert counter.frame_count == expected
        torch.compiler.reset()


def test_copies_and_exports_are_not_compiled():
    net = supernet()
    keys = list(net.state_dict())
    counter = _counted(net)
    assert list(net.state_dict()) == keys
    set_subnet(net, Subnet({"stream": 3}, {"stage.0.conv1": 3}, {"stage": 1}))
    for plain in (copy.deepcopy(net), export(net)):
        torch.testing.assert_close(plain(images()), net(images()))
        before = counter.frame_count
        plain.train()(images())
        assert counter.frame_count == before


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
def test_a_checkpoint_of_compiled_blocks_keeps_its_subnet(use_reentrant):
    net, eager = supernet(), supernet()
    _counted(net)
    first, second = (Subnet({"stage.0.inner": rows}, depths={"stage": 1}) for rows in ([0, 1], [3, 5]))
    x = torch.randn(2, 8, 5, 5).requires_grad_()
    set_subnet(eager, first)
    expected = torch.autograd.grad(eager.stage(x).square().sum(), x)
    set_subnet(net, first)
    loss = jdkd.nn.checkpoint(net.stage, x, use_reentrant=use_reentrant).square().sum()
    late = torch.utils.checkpoint.checkpoint(net.stage, x, use_reentrant=use_reentrant).square().sum()
    set_subnet(net, second)
    loss.backward()
    torch.testing.assert_close(x.grad, *expected)
    with pytest.raises(InputError, match="subnet was set after the checkpointed forward"):
        late.backward()


def test_a_norm_with_statistics_of_its_own_is_no_region():
    norm = ElasticBatchNorm2d(4, statistics="own", subnets=["one", "other"]).eval()
    net = nn.Sequential(norm, as_elastic_block(nn.Sequential(ElasticConv2d(4, 4, 1))))
    counter, x = _counted(net), torch.randn(1, 4, 2, 2)
    for name in ("one", "other"):
        norm.set_active(4, name)
        net(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
def test_our_checkpoint_of_a_plainly_compiled_layer_keeps_its_subnet(use_reentrant):
    conv = ElasticConv2d(4, 8, 1, bias=False)
    compiled, x = torch.compile(conv, backend="eager"), torch.ones(1, 4, 2, 2, requires_grad=True)
    conv.set_active(out_channels=[0, 2])
    loss = jdkd.nn.checkpoint(compiled, x, model=conv, use_reentrant=use_reentrant).sum()
    conv.set_active(out_channels=[3, 5])
    loss.backward()
    assert conv.weight.grad.flatten(1).any(1).nonzero().flatten().tolist() == [0, 2]


def test_what_is_compiled_is_not_packed_and_its_copy_is(monkeypatch):
    net = supernet()
    _counted(net)
    twin, plain, counts = copy.deepcopy(net), supernet(), launches(monkeypatch)
    subnet = Subnet({"stream": [6, 1, 2, 5], "stage.0.inner": 3}, depths={"stage": 1})  # one block is compiled
    set_subnet(net, subnet)
    expected = net(images())
    with pack_forwards(net), packed(net):
        torch.testing.assert_close(net(images()), expected)
    assert sum(counts) == 2  # stem and head
    counts.clear()
    for other in (twin, plain):
        set_subnet(other, subnet)
        with packed(other):
            torch.testing.assert_close(other(images()), expected)
    assert counts[0] == counts[1] > 2


def test_autocast_leaves_float64_as_eager_layers_do():
    net, x = nn.Sequential(ElasticConv2d(4, 8, 3).double(), nn.ReLU()), torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x.double())
        _counted(net)
        torch.testing.assert_close(net(x.double()), expected)
        assert expected.dtype == torch.float64
        with pytest.raises(RuntimeError, match=r"expected scalar type|should be the same"):
            net[0](x)
        with pytest.raises(InputError, match=r"x is torch.float32 and the weight is torch.float64"):
            net(x)


def test_refuses_what_is_no_module():
    with pytest.raises(InputError, match=r"compile_elastic: model is a function; give an nn.Module"):
        compile_elastic(lambda x: x)
