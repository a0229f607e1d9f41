"""Plain models made elastic in place along their topology, and back."""

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import swin_transformer

from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.graph import Topology, trace
from jdkd.nn import Subnet, set_subnet
from jdkd.nn.elastic import Elastic
from jdkd.rewrite import Rewrite, elastic_groups, make_elastic, make_plain
from jdkd.rewrite.trial import returned_by
from tests.detectors import detector, small_spec
from tests.graph.networks import PANDetector, Residual, SqueezeExcite, awake, conv
from tests.rewrite.test_torchvision import BACKBONES, FAMILIES


class Inverted(nn.Module):
    """A residual block of a MobileNetV3: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand, self.depthwise = conv(channels, inner, 1), conv(inner, inner, groups=inner)
        self.excite, self.project = SqueezeExcite(inner), nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.project(self.excite(self.depthwise(self.expand(x)))))


class ByName(nn.Module):
    """Blocks that its own forward calls by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 8), Residual(8, 12), Residual(8, 12)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.stem(x))))


def grouped() -> nn.Module:
    """A grouped convolution between group norms: their groups go together."""
    into, within = (functools.partial(nn.GroupNorm, groups) for groups in (8, 4))
    return nn.Sequential(
        conv(3, 8), conv(8, 32, 1, norm=into), conv(32, 32, groups=8, norm=within), nn.Conv2d(32, 4, 1)
    )


def windows() -> nn.Module:
    blocks = [swin_transformer.SwinTransformerBlock(16, 4, [2, 2], [0, 0]) for _ in range(2)]
    patches = nn.Sequential(nn.Conv2d(3, 16, 4, 4), swin_transformer.Permute([0, 2, 3, 1]))
    return nn.Sequential(patches, nn.Sequential(*blocks), nn.LayerNorm(16), nn.Linear(16, 4))


MODELS = {
    "basic": lambda: detector(small_spec("basic")),
    "frozen bottleneck": lambda: detector(small_spec("bottleneck", norm="frozen")),
    "RetinaNet": lambda: FAMILIES["RetinaNet"](BACKBONES["frozen"]()),
    "FCOS, MobileNet": lambda: FAMILIES["FCOS"](BACKBONES["inverted"]()),
    "PAN": PANDetector,
    "squeeze": lambda: nn.Sequential(conv(3, 8), nn.Sequential(Inverted(8, 16), Inverted(8, 24)), nn.Conv2d(8, 4, 1)),
    "grouped": grouped,
    "windows": windows,
}
DETECTORS = ("basic", "frozen bottleneck", "RetinaNet", "FCOS, MobileNet", "PAN")


@functools.cache
def known(name: str) -> tuple[nn.Module, Topology, tuple]:
    """A model, what is coupled in it, and an example."""
    torch.manual_seed(0)
    model = awake(MODELS[name]())
    if name in DETECTORS:
        return model, read(model, size=(64, 96)), ([torch.rand(3, 64, 96)],)
    x = torch.rand(2, 3, 16, 16)
    return model, trace(model, x), (x,)


def assert_returned_alike(one: nn.Module, other: nn.Module, example: tuple) -> None:
    """Every module that runs in both returns the same."""
    ours, theirs = returned_by(one, example), returned_by(other, example)
    assert len(theirs) > 3 and theirs.keys() <= ours.keys()
    for path, tensors in theirs.items():
        for a, b in zip(ours[path], tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["inner", "all"])
def test_a_subnet_equals_the_model_that_was_rewritten_to_it(name, which):
    model, topology, example = known(name)
    groups = topology.inner if which == "inner" else topology.groups
    net = make_elastic(copy.deepcopy(model), topology, groups)
    chosen = {name: max(1, topology[name].units * 2 // 3) for name in net.elastic_groups.groups}
    depths = {blocks.name: max(1, len(blocks.blocks) - 1) for blocks in topology.block_lists}
    if name == "FCOS, MobileNet":  # its pyramid takes the layers of the body by their places
        depths = {}
    set_subnet(net, Subnet(chosen, depths=depths))
    kept, blocks = ({name: range(count) for name, count in each.items()} for each in (chosen, depths))
    assert_returned_alike(net, Rewrite(kept, blocks=blocks).apply(model, topology), example)
    assert chosen and net.elastic_groups.stages.keys() == {blocks.name for blocks in topology.block_lists}
    set_subnet(net, Subnet())
    assert_returned_alike(net, model, example)


def state_of(model: nn.Module) -> list:
    """Everything that a model's modules are and hold."""
    return [(path, type(m), {**vars(m)}) for path, m in model.named_modules()]


@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_leaves_every_object_and_number_as_it_was(name):
    model, topology, example = known(name)
    net = copy.deepcopy(model)
    net.note, layer = "mine", next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    layer.train().weight.requires_grad_(False).tag = "kept"
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before, keys = state_of(net), [*net.state_dict()]
    objects = {name: (id(tensor), tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    expected = returned_by(copy.deepcopy(net), example)[""]
    assert make_elastic(net, topology, topology.groups) is net
    assert [*net.state_dict()] == keys and [path for path, _ in net.named_modules()] == [path for path, *_ in before]
    set_subnet(net, Subnet(dict.fromkeys(net.elastic_groups.groups, 1)))
    net(*copy.deepcopy(example))
    assert calls and not layer.weight.requires_grad and layer.weight.tag == "kept"
    assert make_plain(net) is net
    assert state_of(net) == before
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert id(tensor) == objects[name][0] and torch.equal(tensor, objects[name][1])
    for one, other in zip(returned_by(net, example)[""], expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["frozen bottleneck", "grouped", "windows"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_elastic_by_itself(name, copied):
    model, topology, example = known(name)
    if name == "frozen bottleneck":  # torchvision's transform and anchors need no copy here
        model, example = model.backbone, (torch.rand(1, 3, 64, 64),)
        topology = trace(model, *example)
    net = make_elastic(copy.deepcopy(model), topology, topology.groups)
    small = Subnet(dict.fromkeys(net.elastic_groups.groups, 2), depths=dict.fromkeys(net.elastic_groups.stages, 1))
    set_subnet(net, small)
    other = copied(net)
    assert_returned_alike(other, net, example)
    set_subnet(net, Subnet())
    set_subnet(other, Subnet())
    assert_returned_alike(other, model, example)
    make_plain(net)
    assert any(isinstance(module, Elastic) for module in other.modules())


def test_blocks_of_a_custom_forward_return_their_input_when_they_are_off():
    model = awake(nn.Sequential(ByName()))
    x = torch.rand(2, 3, 8, 8)
    topology = trace(model, x)
    net = make_elastic(copy.deepcopy(model), topology)
    assert net.elastic_groups.stages == {"0": ("0.first", "0.second")}
    set_subnet(net, Subnet(depths={"0": 1}))
    inner = model[0]
    torch.testing.assert_close(net(x), inner.out(inner.first(inner.stem(x))))
    assert isinstance(net[0].second, Residual) and "switched off" in repr(net)
    net(x).sum().backward()
    assert net[0].first.norm.weight.grad is not None and net[0].second.norm.weight.grad is None


class Padded(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Odd(nn.Module):
    """Groups that cannot be elastic, each for another reason, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.after = Padded(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.left, self.right, self.joined = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(12, 8, 1)
        self.tied, self.again = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.again.weight = self.tied.weight
        self.scaled, self.gains = nn.Conv2d(8, 8, 1), nn.ParameterList([torch.ones(1, 8, 1, 1)])
        self.flipped, self.behind, self.bare = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.good, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.own(x).relu()).relu()
        x = self.joined(torch.cat((self.left(x).relu(), self.right(x).relu()), 1))
        x = self.scaled(self.again(self.tied(x).relu()).relu()) * self.gains[0]
        x = self.behind(self.flipped(x).flip(1).relu()).relu()
        x = nn.functional.conv2d(x, self.bare.weight)  # without its bias
        return self.out(self.good(x.relu()).relu())


def test_what_stays_plain_is_said_with_its_reason():
    model = awake(Odd())
    topology = trace(model, torch.rand(1, 3, 8, 8))
    before = state_of(model)
    said = elastic_groups(model, topology, topology.groups)
    assert state_of(model) == before
    assert said.groups.keys() == {"after", "behind", "good"}
    assert said.groups.keys() | said.left_out.keys() == {group.name for group in topology.groups}
    assert {*said.left_out.values()} == {
        "own is a Padded, which has no elastic form",
        "other channels stand beside it in dimension 1 of joined.weight, as in a concatenation",
        "tied.weight is shared by several layers",
        "gains.0 is of a ParameterList, which has no elastic form",
        "its channels do not stand one after the other in dimension 1 of behind.weight",
        "bias of bare does not follow it",
    }
    net = make_elastic(model, topology, topology.groups)
    assert net.elastic_groups == said
    assert {path for path, module in net.named_modules() if isinstance(module, Elastic)} == {
        side.module for sides in said.groups.values() for side in sides
    }


@pytest.mark.parametrize("rewrite", [Rewrite(keep={"0": [0, 2]}), Rewrite(extra={"0": 1})])
def test_channels_of_elastic_layers_are_not_rewritten(rewrite):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    topology = trace(model, torch.ones(1, 3, 4, 4))
    make_elastic(model, topology, topology.groups)
    with pytest.raises(InputError, match="'0' is an ElasticConv2d, whose channels are not rewritten; take the active"):
        rewrite.apply(model, topology)
    assert rewrite.apply(make_plain(model), topology)[0].out_channels in (2, 5)


def test_an_elastic_model_is_not_made_elastic_again():
    model, topology, _ = known("squeeze")
    net = nn.DataParallel(make_elastic(copy.deepcopy(model), topology))
    with pytest.raises(InputError, match=r"this Sequential is elastic already; take that back by make_plain"):
        make_elastic(net, topology)
    make_plain(net)
    assert make_elastic(net, topology) is net and net.module.elastic_groups.groups


def test_where_one_layer_cannot_be_plain_the_model_stays_elastic():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    topology = trace(model, torch.ones(1, 3, 4, 4))
    make_elastic(model, topology, topology.groups)
    torch.nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(InputError, match=r"as_plain: a ParametrizedElasticConv2d is none of .*remove_parametrizations"):
        make_plain(model)
    set_subnet(model, Subnet({"0": 2}))
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert [type(layer) for layer in make_plain(model)] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


@pytest.mark.parametrize("rewrite", [Rewrite(keep={"0": [0, 2]}), Rewrite(blocks={"1": [0]})])
def test_a_topology_from_before_a_rewrite_makes_nothing_elastic(rewrite):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(*(Residual(8, 4) for _ in range(2))), nn.Conv2d(8, 4, 1))
    topology = trace(model, torch.rand(1, 3, 8, 8))
    child = rewrite.apply(model, topology)
    with pytest.raises(InputError, match="the topology was read off another model"):
        make_elastic(child, topology)
    assert not any(isinstance(module, Elastic) for module in child.modules())
