"""One switch for a whole model: subnets as data, coupled channels, errors that say where."""

import array
import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

from jdkd.errors import InputError
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
from jdkd.nn.elastic import Elastic
from tests.nn.elastic_models import BLOCKS, GROUPS, SMALL, Net, depth_of, images, randomised, supernet


def test_a_subnet_is_data():
    subnet = Subnet({"b": [3, 1], "a": 4}, kernel_sizes={"conv": (3, 5)}, depths={"stage": 2})
    again = Subnet.from_json(json.loads(json.dumps(subnet.to_json())))
    assert again == subnet and hash(again) == hash(subnet)
    assert Subnet({"a": 4, "b": torch.tensor([3, 1])}, {"conv": (3, 5)}, {"stage": 2}) == subnet
    assert len({subnet, again, Subnet(), Subnet({"a": 4})}) == 3
    with pytest.raises(AttributeError):
        subnet.channels = ()
    with pytest.raises(InputError, match=r"no fields \['widths'\]; give channels, kernel_sizes, depths"):
        Subnet.from_json({"widths": [1.0]})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Subnet(5), r"Subnet: channels=5; give a mapping"),
        (lambda: Subnet(depths="stage"), r"Subnet: depths='stage'; give a mapping"),
        (lambda: Subnet.from_json({"channels": None}), r"Subnet: channels=None; give a mapping"),
        (lambda: Subnet.from_json([1]), r"Subnet.from_json: fields=\[1\]; give the dict that to_json returns"),
        (lambda: set_subnet(supernet(), {"stream": 3}), r"set_subnet: subnet=\{'stream': 3\} is a dict; give a Subnet"),
        (lambda: ElasticGroups({"a": ["0.out"]}), r"group 'a' holds '0.out'; give pairs \(module, side\)"),
        (lambda: ElasticGroups({"a": [("0",)]}), r"group 'a' holds \('0',\); give pairs"),
        (lambda: ElasticGroups({"a": "0.out"}), r"group 'a' is '0.out'; give a list of pairs"),
        (lambda: ElasticGroups({"a": [("0", "in", 4.0)]}), r"group 'a' has repeat 4.0 of 0; give an int"),
        (lambda: ElasticGroups({"a": [("0", "in", True)]}), r"group 'a' has repeat True of 0; give an int"),
        (lambda: ElasticGroups({"a": None}), r"group 'a' is None; give a list of pairs"),
        (lambda: ElasticGroups([("0", "out")]), r"groups=\[\('0', 'out'\)\]; give a mapping from names"),
        (lambda: ElasticGroups({}, ["stage"]), r"stages=\['stage'\]; give a mapping from names"),
        (lambda: ElasticGroups({}, {"s": "stage"}), r"stage 's' is 'stage'; give a list of the paths of its blocks"),
    ],
)
def test_says_what_to_give_instead(make, words):
    with pytest.raises(InputError, match=words):
        make()


INTEGERS = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
LISTS = [
    (2, 0), np.array([2, 0]), torch.tensor([2, 0]), [np.int32(2), torch.tensor(0)], range(2, -1, -2),
    torch.tensor([2, 0], dtype=torch.uint8), array.array("b", [2, 0]),
]  # fmt: skip


@pytest.mark.parametrize("value", [*INTEGERS, *LISTS], ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)))
def test_integers_of_every_kind_are_taken_and_made_pythons(value):
    plain = [2, 0] if not isinstance(value, int) and any(value is entry for entry in LISTS) else 3
    subnet, expected = Subnet({"stream": value}), Subnet({"stream": plain})
    assert subnet == expected and hash(subnet) == hash(expected) and subnet.id == expected.id
    assert json.loads(json.dumps(subnet.to_json())) == expected.to_json()
    set_subnet(net := supernet(), subnet)
    layer, norm = ElasticConv2d(3, 8, 3), ElasticBatchNorm2d(8)
    layer.set_active(out_channels=value)
    norm.set_active(value)
    for part in (layer._record.active.outputs, norm._record.active.channels, net.bn._record.active.channels):
        assert (part.count, part.index) == (3, None) if plain == 3 else part.index.tolist() == plain


@pytest.mark.parametrize("value", INTEGERS, ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)))
def test_depths_and_kernel_sizes_are_integers_of_every_kind(value):
    subnet = Subnet(kernel_sizes={"stage.0.conv1": value, "stage.1.conv1": [value, 5]}, depths={"stage": value})
    assert subnet == Subnet(kernel_sizes={"stage.0.conv1": 3, "stage.1.conv1": (3, 5)}, depths={"stage": 3})
    assert all(type(number) is int for number in (subnet.depths[0][1], *subnet.kernel_sizes[1][1]))
    set_subnet(net := supernet(), subnet)
    assert net.stage[0].conv1.active_kernel_size == (3, 3) and depth_of(net) == 3


NO_INTEGERS = [True, np.True_, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor(True), "2", b"2", {2}, iter([2])]
NO_LISTS = [[1.0], [True, False], np.array([True, False]), np.array([[1]]), torch.tensor([True]), [-1, 0], [1, 1], [],
            torch.tensor([1], device="meta")]  # fmt: skip


@pytest.mark.parametrize(
    "value", [*NO_INTEGERS, *NO_LISTS, -1, 0, [9]], ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value))
)
def test_no_layer_takes_what_is_no_channel(value):
    conv, norm, linear = ElasticConv2d(4, 8, 1), ElasticBatchNorm2d(8), ElasticLinear(8, 4)
    before = conv._record, norm._record, linear._record
    for act in (lambda: conv.set_active(None, value), lambda: norm.set_active(value), lambda: linear.set_active(value)):
        with pytest.raises(InputError, match=r"set_active: (out_|in_)?channels"):
            act()
    assert before == (conv._record, norm._record, linear._record)


@pytest.mark.parametrize(
    "value", [*NO_INTEGERS, *NO_LISTS, -1, 0, None], ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value))
)
def test_no_subnet_is_made_of_what_is_no_integer(value):
    for name in ("channels", "kernel_sizes", "depths"):
        if name == "kernel_sizes" and isinstance(value, list) and value == [1, 1]:
            continue  # taps, in both directions
        with pytest.raises(InputError, match=rf"Subnet: {name}\['a'\]"):
            Subnet(**{name: {"a": value}})


def test_a_repeat_is_an_integer_of_any_kind():
    groups = ElasticGroups({"a": [("0", "in", np.int64(4))]})
    assert groups == ElasticGroups({"a": [("0", "in", 4)]}) and type(groups.groups["a"][0].repeat) is int


def test_names_in_a_subnet_are_text():
    with pytest.raises(InputError, match="Subnet: channels has the name 1, a int; give names as text"):
        Subnet({1: 4})


def test_two_ways_to_write_the_same_channels_are_two_subnets():
    same = [Subnet({"stream": 8}), Subnet({"stream": list(range(8))}), Subnet()]
    assert len(set(same)) == len({subnet.id for subnet in same}) == 3
    net, shown = supernet(), set()
    for subnet in same:
        set_subnet(net, subnet)
        shown.add(repr(net))
    assert len(shown) == 1


@pytest.mark.parametrize(
    "subnet",
    [Subnet(), Subnet({"stream": 4}), Subnet(**SMALL), Subnet(**SMALL, depths={"stage": 1})],
    ids=["all", "leading", "small", "shallow"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_subnet_equals_its_export(subnet, training):
    net = supernet().train(training)
    set_subnet(net, subnet)
    plain = export(net)
    assert not any(isinstance(module, Elastic) for module in plain.modules())
    assert plain.training is training and all(module.training is training for module in plain.modules())
    x = images()
    torch.testing.assert_close(net(x), plain(x))


def test_everything_that_is_coupled_changes_at_once():
    net = supernet()
    set_subnet(net, Subnet(**SMALL, depths={"stage": 2}))
    block = net.stage[0]
    assert (net.stem.active_out_channels, net.bn.active_channels, net.head.active_in_channels) == (4, 4, 16)
    assert (block.conv1.active_in_channels, block.conv1.active_out_channels, block.conv2.active_in_channels) == (
        4,
        3,
        3,
    )
    assert block.conv1.active_kernel_size == (3, 3) and net.stage[1].conv1.active_kernel_size == (1, 1)
    assert depth_of(net) == 2
    set_subnet(net, Subnet())
    whole = copy.deepcopy(supernet())
    assert repr(net) == repr(whole)
    torch.testing.assert_close(net(images()), whole(images()), rtol=0, atol=0)


def test_what_a_subnet_does_not_name_is_whole():
    net = supernet()
    net.extra = nn.Sequential(ElasticConv2d(8, 8, 3), as_elastic_block(nn.Sequential(nn.ReLU())))
    net.extra[0].set_active(3)
    net.extra[1].set_active(False)
    set_subnet(net, Subnet({"stage.1.inner": 2}))
    assert net.extra[0].active_in_channels == 8 and net.extra[1].is_active


def test_two_subnets_in_one_graph_add_their_gradients():
    net, x = supernet(), images()
    subnets = [Subnet(**SMALL), Subnet({"stream": [6, 1, 2, 4]}), Subnet(depths={"stage": 1})]
    alone = []
    for subnet in subnets:
        set_subnet(net, subnet)
        net.zero_grad()
        net(x).square().sum().backward()
        alone.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()})
    net.zero_grad()
    losses = []
    for subnet in subnets:
        set_subnet(net, subnet)
        losses.append(net(x).square().sum())
    sum(losses).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(gradients[name] for gradients in alone))


def test_layers_of_a_group_share_a_list_where_their_weights_are():
    net = supernet().to("meta")
    set_subnet(net, Subnet({"stream": [6, 1]}))
    index = net.stem._record.active.outputs.index
    assert index.tolist() == [6, 1] and net.bn._record.active.channels.index is index
    net = supernet()
    set_subnet(net, Subnet({"stream": [6, 1]}))
    assert net.head._record.active.inputs.index.tolist() == [24, 25, 26, 27, 4, 5, 6, 7]


def test_a_copy_of_a_model_has_a_subnet_of_its_own():
    net, x = supernet(), images()
    set_subnet(net, Subnet(**SMALL))
    expected = net(x)
    copied = copy.deepcopy(net)
    set_subnet(net, Subnet())
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
    set_subnet(copied, Subnet())
    torch.testing.assert_close(copied(x), net(x), rtol=0, atol=0)


def test_state_dicts_load_from_and_into_the_plain_model():
    plain, net = randomised(Net(), seed=5), supernet()
    net.load_state_dict(plain.state_dict())
    torch.testing.assert_close(net(images()), plain(images()))
    plain.load_state_dict(supernet().state_dict())
    torch.testing.assert_close(plain(images()), supernet()(images()))


@pytest.mark.parametrize(
    ("subnet", "words"),
    [
        ({"channels": {"stream": 9}}, ["group 'stream'", "9", "has 8"]),
        ({"channels": {"stream": [0, 8]}}, ["group 'stream'", "index 8", "0 to 7"]),
        ({"channels": {"rest": 3}}, ["'rest'", "stream"]),
        ({"kernel_sizes": {"stage.0.conv1": 4}}, ["stage.0.conv1", "kernel_size=4", "5x5"]),
        ({"kernel_sizes": {"stage.0.bn1": 3}}, ["stage.0.bn1", "kernel_size=3", "ElasticBatchNorm2d"]),
        ({"kernel_sizes": {"stage.9.conv1": 3}}, ["stage.9.conv1", "no elastic convolution"]),
        ({"depths": {"stage": 4}}, ["stage 'stage'", "4", "3 blocks"]),
        ({"depths": {"stage": 9}}, ["stage 'stage'", "1 to 3"]),
        ({"depths": {"neck": 1}}, ["'neck'", "stage"]),
    ],
)
def test_refuses_a_subnet_that_does_not_fit_and_changes_nothing(subnet, words):
    net = supernet()
    set_subnet(net, Subnet(**SMALL, depths={"stage": 2}))
    before = repr(net)
    with pytest.raises(InputError) as caught:
        set_subnet(net, Subnet(**subnet))
    for word in ["set_subnet", *words]:
        assert word in str(caught.value)
    assert repr(net) == before


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            {"g": [("stem", "out"), ("stage.0.bn1", "out")]},
            ["'g'", "8 channels at stem (out)", "6 at stage.0.bn1 (out)"],
        ),
        ({"g": [("trunk", "out")]}, ["'g'", "'trunk'", "Net does not have"]),
        ({"g": [("bn", "in")]}, ["'g'", "side 'in' of bn", "ElasticBatchNorm2d"]),
        ({"g": [("pool", "out")]}, ["'g'", "pool", "AdaptiveAvgPool2d"]),
        ({"g": [("head", "in", 5)]}, ["'g'", "5 features a channel at head", "32"]),
        ({"g": []}, ["'g' is empty"]),
        ({"g": [("stem", "left")]}, ["'g'", "side 'left'", "in, out"]),
        ({"g": [("stem", "out")], "h": [("stem", "out")]}, ["stem", "'g' and 'h'"]),
    ],
)
def test_refuses_a_group_whose_members_disagree(groups, words):
    with pytest.raises(InputError) as caught:
        set_subnet(supernet(), Subnet({"g": 2}), ElasticGroups(groups))
    for word in ["ElasticGroups", *words]:
        assert word in str(caught.value)


def test_refuses_a_plain_layer_in_a_group_and_a_model_without_a_declaration():
    net = Net(ElasticConv2d, ElasticBatchNorm2d)
    with pytest.raises(InputError, match=r"head, of the groups stream, is a Linear; build it as an elastic layer"):
        set_subnet(net, Subnet(), ElasticGroups(GROUPS))
    with pytest.raises(InputError, match="Net does not say which of its channels are coupled"):
        set_subnet(net, Subnet())
    with pytest.raises(InputError, match="stage 'stage' holds stage\\.0, a plain Block; make it elastic"):
        set_subnet(net, Subnet(), ElasticGroups({}, {"stage": BLOCKS}))


def _computed(name: str, layer: nn.Module) -> nn.Module:
    """A layer whose weight is computed of other tensors."""
    if name == "l1_unstructured":
        return prune.l1_unstructured(layer, "weight", 0.3)
    return getattr(nn.utils.parametrizations, name)(layer)


@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm", "l1_unstructured"])
@pytest.mark.parametrize("active", [4, [6, 1, 2]], ids=["leading", "listed"])
def test_layers_with_a_computed_weight_are_set(name, active):
    conv, linear = _computed(name, ElasticConv2d(3, 8, 3)), _computed(name, ElasticLinear(32, 5))
    net = nn.Sequential(conv, ElasticBatchNorm2d(8), nn.Flatten(), linear)
    net.elastic_groups = ElasticGroups({"a": [("0", "out"), ("1", "out"), ("3", "in", 4)]})
    net.eval()  # another power iteration at every look at the weight otherwise
    set_subnet(net, Subnet({"a": active}))
    rows = torch.arange(active) if isinstance(active, int) else torch.tensor(active)
    x = torch.randn(2, 3, 4, 4)
    y = conv(x)
    torch.testing.assert_close(y, nn.functional.conv2d(x, conv.weight[rows], conv.bias[rows]))
    columns = (rows[:, None] * 4 + torch.arange(4)).flatten()
    expected = nn.functional.linear(net[1](y).flatten(1), linear.weight[:, columns], linear.bias)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(export(net)(x), expected)


def test_a_change_of_subnet_computes_no_weight():
    conv = _computed("spectral_norm", ElasticConv2d(3, 8, 3))  # in training every look at the weight iterates
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    net = nn.Sequential(conv, ElasticBatchNorm2d(8))
    net.elastic_groups = ElasticGroups({"a": [("0", "out"), ("1", "out")]})
    set_subnet(net, Subnet({"a": 4}))
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


def test_a_norm_of_buffers_alone_has_its_channels_counted():
    net = nn.Sequential(FrozenBatchNorm2d(8), ElasticBatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1))
    modules = dict(net.named_modules())
    groups = ElasticGroups({"a": [("0", "out"), ("1", "out"), ("2", "in")]})
    assert groups.sizes(modules) == {"a": 8}
    with pytest.raises(InputError, match="side 'in' of 0, a FrozenBatchNorm2d, which has no such channels"):
        ElasticGroups({"a": [("0", "in")]}).sizes(modules)


def test_a_norm_without_tensors_is_set():
    net = nn.Sequential(ElasticBatchNorm2d(8, affine=False, track_running_stats=False))
    set_subnet(net, Subnet({"a": 3}), ElasticGroups({"a": [("0", "out")]}))
    assert net(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4) and net[0].active_channels == 3


def test_a_group_that_is_cut_is_named():
    net = nn.Sequential(ElasticConv2d(6, 6, 3, groups=2))
    with pytest.raises(InputError, match=r"set_subnet: 0 \(groups g\): in_channels=4 cuts through a group of 3"):
        set_subnet(net, Subnet({"g": 4}), ElasticGroups({"g": [("0", "in")]}))
