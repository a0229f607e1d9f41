"""A model on packed weights: what a forward sees of them, for how long, and what is left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import jdkd.nn
from jdkd.errors import InputError
from jdkd.experimental import ElasticConvBNAct, pack_forwards, packed
from jdkd.nn import ElasticConv2d, ElasticLinear, Subnet, set_subnet
from tests.experimental.packing_cases import SUBNETS, launches, nothing_packed, small, step
from tests.nn.elastic_models import images

BF16 = torch.bfloat16
subnets = pytest.mark.parametrize("name", SUBNETS)


def _scale_by_optimizer(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(net.parameters(), 0.1, fused=True).step()
    return net


def _write_data(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    return net


def _exchange_data(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.5
    return net


def _load_assigned(net: nn.Module) -> nn.Module:
    state = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net


def _average(net: nn.Module) -> nn.Module:
    others = [torch.full_like(parameter, 0.3) for parameter in net.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(list(net.parameters()), others, 0.4)
    return net


def _write_flat(net: nn.Module) -> nn.Module:
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat * 1.5, net.parameters())
    return net


WRITES = [_scale_by_optimizer, _write_data, _exchange_data, _load_assigned, _average, _write_flat]
writes = pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))


@subnets
@torch.no_grad()
def test_frozen_evaluation_packs_once_for_all_forwards(name, monkeypatch):
    net, counts = small(name), launches(monkeypatch)
    expected = net(images())
    with packed(net) as inside:
        assert inside is net
        for _ in range(3):
            torch.testing.assert_close(net(images()), expected)
    whole = sum(isinstance(layer, ElasticConv2d | ElasticLinear) for layer in net.modules())
    assert nothing_packed(net) and len(counts) == (name != "whole") and all(0 < count <= whole for count in counts)
    assert torch.equal(net(images()), expected)


@subnets
def test_a_layer_on_packed_weights_reads_nothing_else(name):
    net = small(name)
    with torch.no_grad(), packed(net):
        expected = net(images())
        for layer in net.modules():
            if isinstance(layer, ElasticConv2d | ElasticLinear) and layer._packed.part is not None:
                layer.weight.fill_(torch.nan)
        assert torch.equal(net(images()), expected)


def test_a_forward_after_a_change_of_subnet_packs_anew(monkeypatch):
    net, counts = small("leading"), launches(monkeypatch)
    expected = {}
    for name, subnet in SUBNETS.items():
        set_subnet(net, subnet)
        expected[name] = net(images())
    with packed(net):
        for name, subnet in SUBNETS.items():
            set_subnet(net, subnet)
            for _ in range(2):
                torch.testing.assert_close(net(images()), expected[name])
    assert len(counts) == len(SUBNETS)  # on entry, and one each for those that are not whole


def test_a_layer_called_alone_after_a_change_uses_its_slice():
    net = small()
    with torch.no_grad(), packed(net):
        net.stem.set_active(None, [2, 7])
        net.stem.weight.mul_(2)
        filters = net.stem.weight[[2, 7]]
        x = images()
        plain = nn.functional.conv2d(x, filters, net.stem.bias[[2, 7]], padding=1)
        torch.testing.assert_close(net.stem(x), plain)


def test_parts_of_a_model_called_alone_use_what_was_packed(monkeypatch):
    net = small()
    with torch.no_grad(), packed(net):
        counts = launches(monkeypatch)
        before = net.stem(images())
        net.stem.weight.zero_()
        assert torch.equal(net.stem(images()), before) and not counts


@writes
def test_writes_inside_are_not_seen_but_exchanged_parameters_are(write):
    net = small()
    with torch.no_grad(), packed(net):
        before = net.stem.weight, net.stem._packed.part.clone()
        with torch.enable_grad():
            write(net)
        x = images()
        y = net.stem(x) - net.stem.bias[net.stem._record.active.outputs.index, None, None]
        if net.stem.weight is before[0]:
            torch.testing.assert_close(y, nn.functional.conv2d(x, before[1], padding=1))
        else:
            torch.testing.assert_close(y, nn.functional.conv2d(x, net.stem._shared_filters(net.stem._now()), padding=1))


@writes
@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_writes_between_forwards_are_seen_by_the_next(write, grad):
    net, plain = small(), small()
    with pack_forwards(net), torch.set_grad_enabled(grad):
        net(images())
        torch.testing.assert_close(write(net)(images()), write(plain)(images()))


def test_averages_in_a_copy_are_seen_by_its_next_forward():
    net = small()
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    plain = copy.deepcopy(ema)
    with torch.no_grad(), pack_forwards(ema):
        for _ in range(2):
            _write_data(net)
            ema.update_parameters(net)
            plain.update_parameters(net)
            torch.testing.assert_close(ema(images()), plain(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_nothing_packed_survives_a_forward(fails, monkeypatch):
    net, counts = small(), launches(monkeypatch)
    handle = pack_forwards(net)
    if fails:
        with pytest.raises(InputError, match="channels"):
            net(torch.zeros(1, 4, 6, 6))
    else:
        step(net)
    assert nothing_packed(net) and len(counts) == 1
    step(net)
    assert len(counts) == 2
    handle.remove()
    handle.remove()
    step(net)
    assert len(counts) == 2 and not net._forward_hooks and not net._forward_pre_hooks


def test_what_an_interrupted_forward_left_is_not_used_by_the_next(monkeypatch):
    net, plain = small(), small()
    pack_forwards(net)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = net.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(images())
    hook.remove()
    torch.testing.assert_close(_write_data(net)(images()), _write_data(plain)(images()))


def test_an_exception_inside_leaves_nothing_behind():
    net = small()
    with pytest.raises(ZeroDivisionError), packed(net):
        raise ZeroDivisionError
    assert nothing_packed(net) and net.stem._packing is None and not net._forward_pre_hooks


def test_the_inner_of_two_packs_for_itself(monkeypatch):
    net, counts = small(), launches(monkeypatch)
    with torch.no_grad(), pack_forwards(net), packed(net):
        frozen = net(images())
        net.stem.weight.mul_(2)
        assert torch.equal(net(images()), frozen) and len(counts) == 1
        with packed(net.stage), packed(net):
            assert not torch.equal(net(images()), frozen)
        assert torch.equal(net(images()), frozen) and len(counts) == 3


def test_the_outer_of_two_may_end_first():
    net = small()
    first, second = packed(net), packed(net)
    with torch.no_grad():
        for scope in (first, second):
            scope.__enter__()
        expected = net(images())
        first.__exit__(None, None, None)
        torch.testing.assert_close(net(images()), expected)
        second.__exit__(None, None, None)
        net.stem.weight.mul_(2)
        assert not torch.equal(net(images()), expected)
    assert all(layer._packing is layer._packed is None for layer in net.modules() if isinstance(layer, ElasticConv2d))


def test_a_handle_removed_inside_a_with_stays_removed(monkeypatch):
    net = small()
    handle = pack_forwards(net)
    with packed(net):
        handle.remove()
    counts = launches(monkeypatch)
    step(net)
    assert not counts and net.stem._packing is None
    pack_forwards(net).remove()


def test_what_is_active_as_a_whole_needs_no_copy(monkeypatch):
    net, counts = small("whole"), launches(monkeypatch)
    net.stem.weight.data = net.stem.weight.data.contiguous(memory_format=torch.channels_last)
    with packed(net):
        net(images())
    assert not counts
    net.head.weight.data = net.head.weight.data.t().contiguous().t()
    with packed(net):
        assert net.head._packed.part.is_contiguous()
    with packed(net, dtype=BF16):
        net(images().bfloat16())
    assert counts == [1, 11]


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@torch.no_grad()
def test_the_fused_unit_folds_into_packed_filters(padding_mode):
    unit = ElasticConvBNAct(8, 8, 3, padding=1, padding_mode=padding_mode).eval()
    unit.set_active([5, 1, 2], [7, 0])
    x = torch.randn(2, 3, 9, 9)
    expected = unit(x)
    with packed(unit):
        torch.testing.assert_close(unit(x), expected)
        unit.conv.weight.zero_()
        torch.testing.assert_close(unit(x), expected)


def test_kernel_transforms_stay_on_their_route():
    conv, x = ElasticConv2d(4, 4, 5, padding=2, kernel_transform=True), torch.randn(1, 3, 6, 6)
    conv.set_active(3, 2, 3)
    plain = copy.deepcopy(conv)
    step(plain, x)
    with packed(conv):
        assert conv._packed.part is None
        step(conv, x)
        torch.testing.assert_close(conv.weight.grad, plain.weight.grad)
        torch.testing.assert_close(conv.transform_5to3.grad, plain.transform_5to3.grad)


def test_computed_weights_are_not_packed(monkeypatch):
    conv, counts = ElasticConv2d(4, 4, 1), launches(monkeypatch)
    conv.set_active(3)
    parametrize.register_parametrization(conv, "weight", nn.Softplus())
    x = torch.randn(1, 3, 2, 2)
    expected = conv(x)
    with packed(conv):
        assert torch.equal(conv(x), expected) and not counts


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_shares_and_keeps_nothing_packed(way, monkeypatch):
    net = small()
    expected, keys = net(images()), list(net.state_dict())
    with pack_forwards(net), packed(net):
        assert list(net.state_dict()) == keys
        twin, layer = way(net), way(net.stem)
    for copied in (layer, copy.copy(net.stem), twin.stem):
        assert copied._packed is None and copied._packing is None
    counts = launches(monkeypatch)
    torch.testing.assert_close(twin(images()), expected)
    assert not counts
    with packed(twin):
        torch.testing.assert_close(_write_data(net)(images()), _write_data(small())(images()))
    assert len(counts) == 1


def test_exports_hold_the_shared_weights():
    net = small()
    expected = net(images())
    for scope in (packed(net, dtype=BF16), pack_forwards(net, dtype=BF16)):
        with scope:
            plain, stem = jdkd.nn.export(net), net.stem.export()
        torch.testing.assert_close(plain(images()), expected)
        torch.testing.assert_close(stem.weight, net.stem.weight[[6, 1, 2, 5]])


def test_moving_a_model_inside_makes_it_pack_again():
    net = small()
    with packed(net):
        net.double()
        net.stem(images().double())
        assert net(images().double()).dtype == torch.float64
        assert net.stem._packed.part.dtype == torch.float64


def test_plain_models_have_nothing_to_pack():
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    with packed(net), pack_forwards(net):
        net(images())


def test_refusals_name_the_remedy():
    net = small()
    for scope in (packed, pack_forwards):
        with (
            pytest.raises(InputError, match="grad_mode='both' is none of autograd, main_grad"),
            scope(net, grad_mode="both"),
        ):
            pass
        with pytest.raises(InputError, match="choose float32, bfloat16 or float16"), scope(net, dtype=torch.int8):
            pass
    with pack_forwards(net.stage), pytest.raises(InputError, match=r"stage.0.conv1 is packed already; remove"):
        pack_forwards(net)
    assert net.stem._packing is None and not net._forward_hooks
    with packed(net), pytest.raises(InputError, match="leave that with"):
        pack_forwards(net)
    set_subnet(net, Subnet())
