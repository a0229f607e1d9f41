"""Batch-norm statistics over several batches, against the pooled data in float64."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from jdkd.errors import InputError
from jdkd.nn import ElasticBatchNorm2d, Subnet, export, set_subnet
from jdkd.train import calibrate_bn
from tests.detectors import detector, small_spec
from tests.nn.elastic_models import supernet

MENU = [Subnet({"stream": [6, 1, 2], "stage.0.inner": 3}), Subnet({"stream": 2}, depths={"stage": 2})]


def own_statistics():
    model = supernet(norm=functools.partial(ElasticBatchNorm2d, statistics="own", subnets=MENU))
    for norm in (module for module in model.modules() if isinstance(module, ElasticBatchNorm2d)):
        norm.reset_running_stats()
    return model


def uneven_batches() -> list[Tensor]:
    """Batches of different sizes, brightness and contrast, ``[N, 2, H, W]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 4, 4), (3, 2, 4, 6), (2, 2, 5, 5)]
    return [
        torch.randn(shape, generator=generator) * (k + 1) + torch.tensor([3.0 * k, -5.0])[:, None, None]
        for k, shape in enumerate(shapes)
    ]


def pooled(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.cat([batch.double().transpose(0, 1).flatten(1) for batch in batches], dim=1)  # [C, n]
    return values.mean(1).float(), values.var(1).float()


def test_mean_and_variance_are_those_of_all_batches_together():
    norm, batches = nn.BatchNorm2d(2), uneven_batches()
    calibrate_bn(nn.Sequential(norm), batches)
    mean, variance = pooled(batches)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    averaged = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    assert (variance / averaged)[0] > 1.5, "the batches must differ for this test to mean anything"


@pytest.mark.parametrize("counts", [(0, 3, 2), (1, 0, 2)])
def test_a_batch_of_nothing_counts_for_nothing(counts):
    """As of a head that is given no regions."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.left = nn.BatchNorm2d(2), [*counts]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[: self.left.pop(0)])

    model, batches = Some(), uneven_batches()
    calibrate_bn(model, batches)
    mean, variance = pooled([batch[:count] for batch, count in zip(batches, counts, strict=True)])
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)


def test_statistics_in_float64_are_pooled_too():
    norm, batches = nn.BatchNorm2d(2).double(), [batch.double() for batch in uneven_batches()]
    calibrate_bn(nn.Sequential(norm), batches)
    values = torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], dim=1)  # [C, n]
    torch.testing.assert_close(norm.running_mean, values.mean(1))
    torch.testing.assert_close(norm.running_var, values.var(1))


def test_a_large_mean_costs_no_accuracy():
    norm = nn.BatchNorm2d(2)
    batches = [batch * 0.1 + 1e3 for batch in uneven_batches()]
    calibrate_bn(nn.Sequential(norm), batches)
    torch.testing.assert_close(norm.running_var, pooled(batches)[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_statistics_that_are_no_numbers_are_left_behind(broken):
    norm, batches = nn.BatchNorm2d(2), uneven_batches()
    norm.running_mean[0] = norm.running_var[1] = broken
    calibrate_bn(nn.Sequential(norm), batches)
    mean, variance = pooled(batches)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


NORMS = {
    "1d": (nn.BatchNorm1d, nn.Flatten(2)),
    "1d of rows": (nn.BatchNorm1d, nn.AdaptiveAvgPool2d(1)),
    "3d": (nn.BatchNorm3d, nn.Unflatten(3, (1, -1))),
    "synchronised": (nn.SyncBatchNorm, nn.Identity()),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_of_every_kind_are_calibrated(name):
    kind, shape = NORMS[name]
    rows = nn.Flatten(1) if name == "1d of rows" else nn.Identity()
    norm, batches = kind(2), uneven_batches()[1:]
    calibrate_bn(nn.Sequential(shape, rows, norm), batches)
    mean, variance = pooled([shape(batch) for batch in batches])
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_a_process_of_several_calibrates_synchronised_norms_by_itself(monkeypatch):
    """As the first does in the training of a pool, while the others wait and could give it nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.SyncBatchNorm(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.SyncBatchNorm(2))
    alone = copy.deepcopy(model)
    calibrate_bn(alone, uneven_batches())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    calibrate_bn(model, uneven_batches())
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model[4].running_mean.any()
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        model.train()(uneven_batches()[0])  # they synchronise again


def test_a_norm_without_a_shape_is_refused_by_name():
    with pytest.raises(InputError, match=r"0, a LazyBatchNorm2d, has no shape yet; run the model once"):
        calibrate_bn(nn.Sequential(nn.LazyBatchNorm2d()), uneven_batches())


def test_a_batch_without_variance_is_refused_by_name():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.BatchNorm1d(2))
    batches = [torch.rand(3, 2, 4, 4), torch.rand(1, 2, 4, 4)]
    with pytest.raises(InputError, match=r"2, a BatchNorm1d, was given \(1, 2\), 1 value a channel.* more images"):
        calibrate_bn(model, batches)
    assert model[2].running_mean.eq(0).all() and model[2].running_var.eq(1).all()


def test_layers_that_are_called_several_times_pool_all_calls():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).sum() + self.norm(2 * x + 1).sum()

    model, batches = Shared(), uneven_batches()
    calibrate_bn(model, batches)
    mean, variance = pooled([*batches, *(2 * batch + 1 for batch in batches)])
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)


def test_modes_momenta_and_weights_stay():
    model = detector(small_spec()).train()
    model.backbone.body.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate_bn(model, [[torch.rand(3, 64, 64)] * 2])
    assert [module.training for module in model.modules()] == modes
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    for name, tensor in model.state_dict().items():
        moved = name.endswith(("running_mean", "running_var"))
        assert torch.equal(tensor, before[name]) != moved, name


def test_a_detector_is_calibrated_through_its_backbone_alone(monkeypatch):
    model = detector(small_spec())
    monkeypatch.setattr(model.rpn, "forward", lambda *_: pytest.fail("the RPN has no batch norm to calibrate"))
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]
    calibrate_bn(model, [(images, None)])
    stem = model.backbone.body.conv1(model.transform(images)[0].tensors)
    mean, variance = pooled([stem.detach()])
    first = model.backbone.body.bn1
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, variance)


def test_batch_norms_in_the_heads_are_calibrated_too():
    model = detector(small_spec())
    model.rpn.head.conv.add_module("norm", nn.BatchNorm2d(16))
    calibrate_bn(model, [[torch.rand(3, 64, 64)] * 2])
    assert model.rpn.head.conv.norm.running_mean.abs().max() > 0


def test_frozen_norms_are_left_alone():
    model = detector(small_spec(norm="frozen"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    calibrate_bn(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_channels_that_are_not_active_keep_their_statistics():
    norm = ElasticBatchNorm2d(4)
    norm.running_mean.fill_(7.0)
    norm.running_var.fill_(9.0)
    norm.set_active([0, 2])
    batches = uneven_batches()
    calibrate_bn(nn.Sequential(norm), batches)
    mean, variance = pooled(batches)
    torch.testing.assert_close(norm.running_mean, torch.stack((mean[0], torch.tensor(7.0), mean[1], torch.tensor(7.0))))
    torch.testing.assert_close(
        norm.running_var, torch.stack((variance[0], torch.tensor(9.0), variance[1], torch.tensor(9.0)))
    )


def test_no_batches_are_an_error_and_an_error_changes_nothing():
    model = detector(small_spec())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="given 0 batches and needs at least 1"):
        calibrate_bn(model, [])

    def breaking():
        yield [torch.rand(3, 64, 64)]
        raise OSError("no more images")

    with pytest.raises(OSError, match="no more images"):
        calibrate_bn(model, breaking())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_several_subnets_are_calibrated_while_the_batches_are_read_once():
    model, batches = own_statistics(), [torch.randn(2, 3, 6, 6) * k for k in (1, 2)]
    set_subnet(model, MENU[0])
    read = iter(batches)  # cannot be read twice
    calibrate_bn(model, read, MENU)
    for subnet in MENU:
        alone = own_statistics()
        set_subnet(alone, subnet)
        plain = export(alone)
        calibrate_bn(plain, batches)
        set_subnet(model, subnet)
        for found, wanted in zip(export(model).buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, wanted)
    assert not torch.equal(model.bn.active_statistics.running_mean, model.bn.running_mean)


def test_the_active_subnet_stays_active():
    model = own_statistics()
    set_subnet(model, MENU[1])
    calibrate_bn(model, [torch.randn(2, 3, 6, 6)], MENU[:1])
    assert model.bn.active_channels == 2
    assert torch.equal(model.bn.active_statistics.running_mean, torch.zeros(8))


def test_no_subnets_are_an_error_that_says_so():
    with pytest.raises(InputError, match="given 0 subnets and needs at least 1; leave subnets out"):
        calibrate_bn(own_statistics(), [torch.randn(2, 3, 6, 6)], [])


def test_subnets_that_share_statistics_are_refused():
    model = supernet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"2 subnets, which share the statistics of bn; .* statistics='own'"):
        calibrate_bn(model, [torch.randn(2, 3, 6, 6)], MENU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_wrapped_detector_is_calibrated_as_without_its_wrapper():
    model = detector(small_spec())
    generator = torch.Generator().manual_seed(0)
    batch = [torch.rand(3, 64, 64, generator=generator), torch.rand(3, 48, 80, generator=generator)]
    wrapped = nn.DataParallel(copy.deepcopy(model))
    calibrate_bn(model, [(batch, None)])
    calibrate_bn(wrapped, [(batch, None)])
    ours, theirs = model.state_dict(), wrapped.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_images_of_several_sizes_need_a_transform():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match=r"Sequential has nothing that brings.*\[3, 8, 8\], \[3, 8, 9\]; give tensors"):
        calibrate_bn(model, [[torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)]])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_and_not_passed_over():
    with pytest.raises(InputError, match="calibrate_bn cannot look into 1, a scripted"):
        calibrate_bn(nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.BatchNorm2d(4))), [torch.zeros(2, 3, 4, 4)])
