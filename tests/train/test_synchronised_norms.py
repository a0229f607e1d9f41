import pytest
import torch
from torch import distributed

from jdkd.detect import detector
from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference
from jdkd.latency.folding import batch_norms
from jdkd.train import TrainConfig, fit


def net(classes):
    torch.manual_seed(0)
    return detector("ssdlite", "mobilenet_v3_small", classes, channels=32, min_size=64, norm="sync")


def test_norms_that_would_synchronise_on_a_cpu_say_what_to_do(digits, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="over the processes of a group, which torch does on GPUs alone"):
            fit(net(digits[0].classes), digits[0], TrainConfig(steps=1, batch_size=2), device="cpu")
    finally:
        distributed.destroy_process_group()


def test_synchronised_norms_are_folded_for_deployment(digits):
    model = net(digits[0].classes)
    assert batch_norms(model) > 30 and batch_norms(fuse_for_inference(model)) == 0
