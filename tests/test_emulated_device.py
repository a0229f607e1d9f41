"""The emulated GPU refuses what a GPU refuses, and what runs on one elsewhere is there throughout."""

import copy

import pytest
import torch
from torch import nn

from jdkd.detect import detector
from jdkd.detect.contract import detections
from jdkd.distill import attach
from jdkd.latency import measure
from jdkd.nn import ElasticConv2d, PKDLoss
from jdkd.patch import accelerate
from tests.conftest import HAS_GPU
from tests.emulated_device import OnGpu, emulated_gpu, waits

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU is here, and need not be emulated")


@pytest.fixture
def gpu():
    with emulated_gpu() as device:
        yield device


def small(family: str = "fcos", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return detector(family, "resnet18", 3, channels=32, norm="batch", min_size=64, max_size=64).eval()


def test_two_devices_do_not_mix(gpu):
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    for mix in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: here[there.long()],
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"same device|can't convert cuda"):
            mix()
    with waits() as found:
        (
            there.sum().item(),
            there.cpu(),
            there[there > 0],
            torch.ones(2).to(gpu),
            torch.ones(2).to(gpu, non_blocking=True),
        )
    assert found == ["_local_scalar_dense", "to the host", "index", "to the GPU"]
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2] and there[torch.tensor([0])].device == gpu
    assert there.cpu().numpy().tolist() == [1, 1, 1] and there.to(here).device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        nn.Linear(3, 1)(there)
    with torch.autocast("cuda", torch.bfloat16):
        assert nn.Linear(3, 1).to(gpu)(there).dtype == torch.bfloat16


def test_a_step_there_is_the_step_here(gpu):
    def stepped(device):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))
        first = net[0].weight
        net.to(device)
        assert first is net[0].weight and first.device.type == torch.device(device).type
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(2, 3, 4, 4, device=device)).square().mean().backward()
            optimizer.step()
        return copy.deepcopy(net).cpu().state_dict()

    there, here = stepped(gpu), stepped("cpu")
    assert not any(isinstance(tensor, OnGpu) for tensor in there.values())
    torch.testing.assert_close(there, here, rtol=0, atol=0)


def test_a_student_is_taught_there_through_adapters(gpu):
    student, teacher = small().to(gpu).train(), small("retinanet", seed=1).to(gpu)
    images = [torch.rand(3, 64, 64, device=gpu) for _ in range(2)]
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]], device=gpu), "labels": torch.tensor([1], device=gpu)}
    with attach(student, teacher, adapter=True) as handle:
        agreements = handle.calibrate([images])
        losses = student(images, [target] * 2)
        sum(losses.values()).backward()
        assert all(parameter.grad.device == gpu for parameter in handle.adapters.parameters())
    assert losses["loss_pkd"].device == gpu and agreements
    assert all(p.grad is None or p.grad.device == gpu for p in student.parameters())


def test_a_loss_on_hooks_lets_the_host_wait_for_nothing_that_it_did_not_wait_for(gpu):
    student, teacher = small().to(gpu).train(), small(seed=1).to(gpu)
    images = [torch.rand(3, 64, 64, device=gpu) for _ in range(2)]
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]], device=gpu), "labels": torch.tensor([1], device=gpu)}

    def waited():
        with waits() as found:
            sum(student(images, [target] * 2).values()).backward()
        return found

    waited()  # anchors are moved once
    alone = waited()
    with attach(student, teacher):
        taught = waited()
    assert sorted(taught) == sorted(alone) and "_local_scalar_dense" in alone, "torchvision's own losses ask"


def test_losses_and_elastic_layers_run_there_without_a_wait(gpu):
    loss = PKDLoss(6.0)
    student, taught = (torch.randn(2, 8, 5, 5, device=gpu, requires_grad=flag) for flag in (True, False))
    with waits() as found:
        value = loss([student], [taught])
        value.backward()
    assert not found
    assert value.device == gpu and student.grad.device == gpu
    layer = ElasticConv2d(8, 8, 3).to(gpu)
    x = torch.randn(1, 4, 9, 9, device=gpu)
    for active in (4, [1, 3, 5, 7], torch.tensor([0, 2, 4, 6]), torch.tensor([0, 2, 4, 6], device=gpu)):
        layer.set_active(active)
        with waits() as found:
            assert layer(x).device == gpu
        assert not found


def test_detectors_are_timed_and_accelerated_there(gpu):
    model, images = small().to(gpu), [torch.rand(3, 64, 64)]
    quick = {"rounds": 2, "min_seconds": 0, "warmup_seconds": 0, "warmup_limit": 0, "brief": True}
    report = measure({"a": model, "b": small("retinanet").to(gpu)}, images, device=gpu, watch=None, **quick)
    assert set(report.models) == {"a", "b"}
    before = detections(model, [images[0].to(gpu)])
    accelerate(model, [images[0].to(gpu)], timed=False, ingredients=("folded", "channels_last", "fused", "grouped"))
    after = detections(model, [images[0].to(gpu)])
    assert after[0]["boxes"].device == gpu
    torch.testing.assert_close(after[0]["boxes"].cpu(), before[0]["boxes"].cpu(), rtol=1e-3, atol=1e-2)
