"""Running statistics of an elastic batch normalisation: shared by all subnets, or one set for each."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from jdkd.errors import InputError
from jdkd.experimental import ElasticConvBNAct
from jdkd.nn import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear, Subnet, set_subnet
from jdkd.nn import export as exported
from tests.nn import elastic_models
from tests.nn.elastic_models import images

NARROW = Subnet({"stream": 5, "stage.1.inner": 2})
LISTED = Subnet({"stream": [6, 1, 2, 5, 0], "stage.1.inner": [3, 0]})


MENU = (NARROW, LISTED, Subnet())
own_norm = functools.partial(ElasticBatchNorm2d, statistics="own", subnets=MENU)
supernet = functools.partial(elastic_models.supernet, norm=own_norm)


def shared_statistics(net: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for name, value in net.state_dict().items() if ".own." not in name and "running" in name]


@pytest.mark.parametrize("subnet", [NARROW, LISTED], ids=["leading", "listed"])
def test_training_a_subnet_moves_its_own_statistics_alone(subnet):
    net, x = supernet(), images()
    before = shared_statistics(net)
    set_subnet(net, LISTED if subnet is NARROW else NARROW)
    other = [value.clone() for value in net.bn.active_statistics.buffers()]
    set_subnet(net, subnet)
    plain = exported(net).train()
    net.train()
    for _ in range(2):
        torch.testing.assert_close(net(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(before, shared_statistics(net), strict=True))
    channels = [6, 1, 2, 5, 0] if subnet is LISTED else range(5)
    torch.testing.assert_close(net.bn.active_statistics.running_mean[list(channels)], plain.bn.running_mean)
    torch.testing.assert_close(net.bn.active_statistics.running_var[list(channels)], plain.bn.running_var)
    assert net.bn.active_statistics.num_batches_tracked == 2
    set_subnet(net, NARROW if subnet is LISTED else LISTED)
    assert all(torch.equal(a, b) for a, b in zip(other, net.bn.active_statistics.buffers(), strict=True))


def test_sets_of_a_plain_state_dict_are_copies_of_its_statistics():
    plain, x = elastic_models.randomised(elastic_models.Net()), images()
    fresh = elastic_models.Net(ElasticConv2d, own_norm, ElasticLinear, elastic_models.elastic_blocks)
    fresh.elastic_groups = supernet().elastic_groups
    fresh.load_state_dict(plain.state_dict())  # strictly
    for subnet in (Subnet(), NARROW):
        set_subnet(fresh.eval(), subnet)
        shared = elastic_models.supernet()
        shared.load_state_dict(plain.state_dict())
        set_subnet(shared, subnet)
        torch.testing.assert_close(fresh(x), shared(x), rtol=0, atol=0)
    fresh.train()(x)
    assert not torch.equal(fresh.bn.own[NARROW.id].running_mean, fresh.bn.own[LISTED.id].running_mean)
    assert torch.equal(fresh.bn.own[LISTED.id].running_mean, plain.bn.running_mean)


def test_a_set_comes_back_with_its_subnet():
    net, x = supernet(), images()
    set_subnet(net, Subnet())
    whole = net(x)
    set_subnet(net, NARROW)
    net.train()(x)
    moved = net.eval()(x)
    set_subnet(net, Subnet())
    torch.testing.assert_close(net(x), whole, rtol=0, atol=0)
    set_subnet(net, NARROW)
    torch.testing.assert_close(net(x), moved, rtol=0, atol=0)


@pytest.mark.parametrize("set_before", [False, True])
def test_buffers_line_up_with_those_of_an_average_made_before_any_subnet_was_set(set_before):
    net = supernet().train()
    if set_before:
        set_subnet(net, NARROW)
    average = AveragedModel(net, use_buffers=True)
    names = [name for name, _ in net.named_buffers()]
    for subnet in (LISTED, NARROW):
        set_subnet(net, subnet)
        net(images())
    average.update_parameters(net)  # the first one copies
    assert [name for name, _ in average.module.named_buffers()] == names == [name for name, _ in net.named_buffers()]
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(average.module.get_buffer(name), buffer, msg=name)
    average.module.load_state_dict(net.state_dict())


def test_the_order_of_sets_is_not_that_in_which_subnets_are_given():
    orders = [MENU, MENU[::-1], (*MENU, NARROW)]
    keys = {tuple(ElasticBatchNorm2d(8, statistics="own", subnets=menu).state_dict()) for menu in orders}
    assert len(keys) == 1


def test_a_subnet_that_was_not_declared_is_refused_with_the_remedy_and_nothing_changes():
    net = supernet()
    set_subnet(net, NARROW)
    before, keys = repr(net), list(net.state_dict())
    with pytest.raises(InputError) as caught:
        set_subnet(net, Subnet({"stream": 3}))
    for words in ("set_subnet: bn (groups stream)", Subnet({"stream": 3}).id, "none of the 3 subnets", "subnets=[...]"):
        assert words in str(caught.value)
    assert repr(net) == before and list(net.state_dict()) == keys


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_state_dict_of_another_menu_is_refused(change):
    menu = (NARROW,) if change == "unexpected" else (*MENU, Subnet({"stream": 3}))
    with pytest.raises(RuntimeError, match=rf"(?s){change.title()} key.*own\."):
        ElasticBatchNorm2d(8, statistics="own", subnets=menu).load_state_dict(supernet().bn.state_dict())


@pytest.mark.parametrize("name", [None, "mine"], ids=["shared", "own"])
@pytest.mark.parametrize("channels", [4, 3, [2, 0]], ids=["all", "leading", "listed"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_are_no_longer_tracked_stay_and_are_read_in_evaluation(channels, name, momentum):
    own = {"statistics": "own", "subnets": [name]} if name else {}
    norm = elastic_models.randomised(ElasticBatchNorm2d(4, momentum=momentum, **own))
    norm.set_active(channels, name)
    norm.track_running_stats = False
    plain = nn.BatchNorm2d(norm.active_channels, momentum=momentum)
    plain.load_state_dict(norm.export().state_dict())
    plain.track_running_stats = False
    before, x = copy.deepcopy(norm.state_dict()), torch.randn(2, norm.active_channels, 5, 5)
    for training in (True, False):
        expected = plain.train(training)(x)
        torch.testing.assert_close(norm.train(training)(x), expected)
        torch.testing.assert_close(norm.export()(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("channels", [3, [3, 0, 1]], ids=["leading", "listed"])
@pytest.mark.parametrize("name", [None, "few"], ids=["shared", "own"])
def test_without_a_momentum_all_batches_that_a_set_saw_count_alike(channels, name):
    norm = ElasticBatchNorm2d(4, momentum=None, **({"statistics": "own", "subnets": ["few"]} if name else {}))
    norm.set_active(channels, name)
    plain = nn.BatchNorm2d(3, momentum=None)
    for seed in range(3):
        x = seed + torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close([*exported(norm).buffers()], [*plain.buffers()])
    assert plain.num_batches_tracked == 3


def test_sets_that_were_assigned_from_a_plain_state_dict_share_no_memory():
    norm = ElasticBatchNorm2d(4, statistics="own", subnets=["few", "many"])
    norm.load_state_dict(nn.BatchNorm2d(4).state_dict(), assign=True)
    norm.set_active(2, "few")
    norm(torch.randn(2, 2, 5, 5) + 3)
    for untouched in (norm, norm.own["many"]):
        assert torch.equal(untouched.running_mean, torch.zeros(4)) and untouched.num_batches_tracked == 0


def test_exports_carry_the_statistics_in_use():
    net, x = supernet(), images()
    set_subnet(net, LISTED)
    net.train()(x)
    torch.testing.assert_close(exported(net.eval())(x), net(x))


def test_a_unit_normalises_with_the_statistics_in_use():
    unit = ElasticConvBNAct(3, 6, 3, statistics="own", subnets=["a"]).eval()
    unit.bn.set_active(6, name="a")
    unit.bn.active_statistics.running_mean.fill_(2.0)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(unit(x), unit.bn(unit.conv(x)).relu())
    assert not torch.allclose(unit(x), nn.BatchNorm2d(6).eval()(unit.conv(x)).relu())


def test_a_state_dict_holds_every_set_and_loads_into_a_fresh_supernet():
    net, x = supernet(), images()
    for subnet in (NARROW, LISTED):
        set_subnet(net, subnet)
        net.train()(x)
    fresh = supernet()
    fresh.load_state_dict(net.state_dict())
    for subnet in (NARROW, LISTED):
        set_subnet(net, subnet)
        set_subnet(fresh, subnet)
        torch.testing.assert_close(fresh.eval()(x), net.eval()(x), rtol=0, atol=0)
    missing = nn.BatchNorm2d(8).load_state_dict(net.bn.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith("own.") for key in missing.unexpected_keys)


def test_sets_follow_their_layer_to_another_dtype_and_into_a_copy():
    norm = ElasticBatchNorm2d(4, statistics="own", subnets=["narrow"])
    norm.set_active(2, name="narrow")
    twin = copy.deepcopy(norm).double()
    assert twin.active_statistics.running_mean.dtype == torch.float64
    twin(torch.randn(2, 2, 3, 3, dtype=torch.float64))
    assert norm.active_statistics.num_batches_tracked == 0
    assert twin.active_statistics.num_batches_tracked == 1
    assert twin.num_batches_tracked == 0


@pytest.mark.parametrize("module_by_module", [False, True], ids=["layer", "modules"])
def test_a_norm_built_without_memory_resets_every_set(module_by_module):
    norm = ElasticBatchNorm2d(4, statistics="own", subnets=["narrow"], device="meta")
    norm.set_active(2, name="narrow")
    if module_by_module:  # as FSDP does
        for module in norm.modules():
            if any(True for _ in module.buffers(recurse=False)):
                _filled_with_7(module.to_empty(device="cpu", recurse=False))
                module.reset_parameters()
    else:
        _filled_with_7(norm.to_empty(device="cpu")).reset_parameters()
    for home in (norm, norm.own["narrow"]):
        assert torch.equal(home.running_mean, torch.zeros(4)) and torch.equal(home.running_var, torch.ones(4))
        assert home.num_batches_tracked == 0
    assert torch.equal(norm.weight, torch.ones(4))


def _filled_with_7(module: nn.Module) -> nn.Module:
    for tensor in module.state_dict().values():
        if not tensor.is_meta:
            tensor.fill_(7)
    return module


def test_a_subnet_is_named_by_what_it_holds():
    assert NARROW.id == Subnet.from_json(NARROW.to_json()).id
    assert len({NARROW.id, LISTED.id, Subnet().id}) == 3
    assert NARROW.id.isidentifier()


def own(subnets):
    return ElasticBatchNorm2d(4, statistics="own", subnets=subnets)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ElasticBatchNorm2d(4, statistics="mine"), "statistics='mine'; choose one of shared, own"),
        (lambda: ElasticBatchNorm2d(4, statistics="own", track_running_stats=False), "track_running_stats=False"),
        (lambda: ElasticBatchNorm2d(4).set_active(2, name="a"), "name='a' but all subnets share .* statistics='own'"),
        (lambda: own(["a"]).set_active(2, name="b"), r"name='b' is none of the 1 subnets that have statistics \(a\)"),
        (lambda: own([]), r"statistics='own' and no subnets to keep them of; list all .* subnets=\[Subnet"),
        (lambda: own(["a.b"]), "subnets holds 'a.b'; give Subnets, or names of letters"),
        (lambda: own(["pop"]), "subnets holds 'pop', an attribute"),
        (lambda: own(["training"]), "subnets holds 'training', an attribute"),
        (lambda: own([{"stream": 3}]), "subnets holds {'stream': 3}; give Subnets"),
        (lambda: own(NARROW), r"subnets=Subnet\(.* is no list"),
        (lambda: ElasticBatchNorm2d(4, subnets=MENU), "subnets names 3 and statistics='shared' keeps one set"),
    ],
)
def test_refuses_what_it_cannot_keep(build, words):
    with pytest.raises(InputError, match=words):
        build()


def test_a_subnet_that_was_first_set_in_inference_mode_trains():
    net, x = supernet(), images()
    with torch.inference_mode():
        set_subnet(net.eval(), LISTED)
        net(x)
    net.train()(x).sum().backward()
    fresh = supernet()
    set_subnet(fresh, LISTED)
    fresh.train()(x).sum().backward()
    for (name, found), expected in zip(net.state_dict().items(), fresh.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
