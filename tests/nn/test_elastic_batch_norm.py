"""Running statistics of an elastic batch normalisation: shared by all subnets, or one set for each."""

import copy
import functools

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.nn import ElasticBatchNorm2d, ElasticConvBNAct, Subnet, set_subnet
from jdkd.nn import export as exported
from tests.nn import elastic_models
from tests.nn.elastic_models import images

NARROW = Subnet({"stream": 5, "stage.1.inner": 2})
LISTED = Subnet({"stream": [6, 1, 2, 5, 0], "stage.1.inner": [3, 0]})


supernet = functools.partial(elastic_models.supernet, norm=functools.partial(ElasticBatchNorm2d, statistics="own"))


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


def test_a_set_begins_as_a_copy_of_the_shared_one_and_comes_back():
    net, x = supernet(), images()
    whole = net(x)
    set_subnet(net, NARROW)
    torch.testing.assert_close(net.bn.active_statistics.running_var, net.bn.running_var, rtol=0, atol=0)
    net.train()(x)
    moved = net.eval()(x)
    set_subnet(net, Subnet())
    torch.testing.assert_close(net(x), whole, rtol=0, atol=0)
    set_subnet(net, NARROW)
    torch.testing.assert_close(net(x), moved, rtol=0, atol=0)


@pytest.mark.parametrize("name", [None, "mine"], ids=["shared", "own"])
@pytest.mark.parametrize("channels", [4, 3, [2, 0]], ids=["all", "leading", "listed"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_are_no_longer_tracked_stay_and_are_read_in_evaluation(channels, name, momentum):
    norm = elastic_models.randomised(ElasticBatchNorm2d(4, momentum=momentum, statistics="own" if name else "shared"))
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


def test_exports_carry_the_statistics_in_use():
    net, x = supernet(), images()
    set_subnet(net, LISTED)
    net.train()(x)
    torch.testing.assert_close(exported(net.eval())(x), net(x))


def test_a_unit_normalises_with_the_statistics_in_use():
    unit = ElasticConvBNAct(3, 6, 3, statistics="own").eval()
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
    norm = ElasticBatchNorm2d(4, statistics="own")
    norm.set_active(2, name="narrow")
    twin = copy.deepcopy(norm).double()
    assert twin.active_statistics.running_mean.dtype == torch.float64
    twin(torch.randn(2, 2, 3, 3, dtype=torch.float64))
    assert norm.active_statistics.num_batches_tracked == 0
    assert twin.active_statistics.num_batches_tracked == 1
    assert twin.num_batches_tracked == 0


@pytest.mark.parametrize("module_by_module", [False, True], ids=["layer", "modules"])
def test_a_norm_built_without_memory_resets_every_set(module_by_module):
    norm = ElasticBatchNorm2d(4, statistics="own", device="meta")
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


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ElasticBatchNorm2d(4, statistics="mine"), "statistics='mine'; choose one of shared, own"),
        (lambda: ElasticBatchNorm2d(4, statistics="own", track_running_stats=False), "track_running_stats=False"),
        (lambda: ElasticBatchNorm2d(4).set_active(2, name="a"), "name='a' but all subnets share .* statistics='own'"),
        (lambda: ElasticBatchNorm2d(4, statistics="own").set_active(2, name="a.b"), "name='a.b' cannot name"),
        (lambda: ElasticBatchNorm2d(4, statistics="own").set_active(2, name="pop"), "name='pop' is an attribute"),
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
