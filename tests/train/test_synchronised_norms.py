from contextlib import contextmanager

import pytest
import torch
from torch import distributed

from jdkd.detect import detector
from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference
from jdkd.latency.folding import batch_norms
from jdkd.pool.shrinking import calibrate
from jdkd.train import TrainConfig, fit
from jdkd.train.optimizer import slimmable_scales


@contextmanager
def group(folder):
    """A process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def net(classes):
    torch.manual_seed(0)
    return detector("ssdlite", "mobilenet_v3_small", classes, channels=32, min_size=64, norm="sync")


def test_norms_that_would_synchronise_on_a_cpu_say_what_to_do(digits, tmp_path):
    with (
        group(tmp_path),
        pytest.raises(InputError, match="over the processes of a group, which torch does on GPUs alone"),
    ):
        fit(net(digits[0].classes), digits[0], TrainConfig(steps=1, batch_size=2), device="cpu")


def test_the_largest_network_of_a_pool_is_calibrated_inside_a_process_group(digits, tmp_path):
    model = net(digits[0].classes)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.SyncBatchNorm))
    with group(tmp_path):
        calibrate(model, digits[0], batch_size=2, seed=0, device="cpu")
    assert norm.running_mean.any() and not model.training


def test_the_scales_of_synchronised_norms_are_drawn_to_zero_too():
    norms = torch.nn.ModuleList([torch.nn.SyncBatchNorm(2), torch.nn.BatchNorm2d(2)])
    assert [id(scale) for scale in slimmable_scales(norms)] == [id(norm.weight) for norm in norms]


def test_synchronised_norms_are_folded_for_deployment(digits):
    model = net(digits[0].classes)
    assert batch_norms(model) > 30 and batch_norms(fuse_for_inference(model)) == 0
