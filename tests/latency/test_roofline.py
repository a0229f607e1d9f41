"""What the operators of a detector would take at a device's best."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jdkd.detect.stages import STAGES
from jdkd.latency import fuse_for_inference, profile_stages
from jdkd.latency.roofline import FLOATS, REPEATS, Ceilings, Roofline, measured_ceilings


def of(flops, *, moved):
    """Ceilings by which copies of all sizes are as fast."""
    return Ceilings(flops, ((1, moved),))


def least(call, ceilings):
    with torch.no_grad(), Roofline(ceilings, lambda: "head") as found:
        call()
    return found.seconds["head"]


@pytest.mark.parametrize(
    ("call", "flops", "moved"),
    [
        (lambda x: x @ torch.ones(4, 3), 2 * 2 * 4 * 3, 4 * (2 * 4 + 4 * 3 + 2 * 3) + 4 * 4 * 3),  # and the ones
        (lambda x: x + 1, 0, 2 * 32),
        (lambda x: x.relu_(), 0, 2 * 32),
        (lambda x: x.view(4, 2).t()[0].reshape(-1), 0, 0),
        (lambda x: torch.empty(9), 0, 0),
        (lambda x: x[:, :1].expand(2, 100) + 0.0, 0, 32 + 4 * 200),  # what is repeated lies there once
    ],
)
def test_an_operator_computes_and_moves_what_it_must(call, flops, moved):
    x = torch.ones(2, 4)
    assert least(lambda: call(x), of(1.0, moved=math.inf)) == flops
    assert least(lambda: call(x), of(math.inf, moved=1.0)) == moved


def test_the_larger_of_both_counts():
    x = torch.ones(2, 4)
    y = torch.ones(4, 3)
    assert least(lambda: x @ y, of(48.0, moved=104.0)) == 1
    assert least(lambda: x @ y, of(12.0, moved=104.0)) == 4
    assert least(lambda: x @ y, of(48.0, moved=26.0)) == 4


def test_what_a_cache_may_hold_moves_as_fast_as_there():
    ceilings = Ceilings(1.0, ((10, 5.0), (100, 20.0), (1000, 2.0)))  # the smallest copy is all overhead
    assert [ceilings.seconds(0, moved) for moved in (10, 100, 1000, 2000)] == [0.5, 5, 500, 1000]


def test_ceilings_are_the_best_of_what_a_device_did():
    class Clock:
        name = "scripted"

        def __init__(self):
            self.taken = []

        def time(self, call):
            if not self.taken:
                call()
            self.taken.append(1.0 if len(self.taken) % REPEATS == 3 else 9.0)
            return self.taken[-1]

    clock = Clock()
    found = measured_ceilings(torch.device("cpu"), clock)
    sizes = [8 * count for count in FLOATS["cpu"]]
    assert found.flops == 2 * 1024**3 / 1e-3 and len(clock.taken) == (2 + len(sizes)) * REPEATS
    assert found.copies == tuple((size, size / 1e-3) for size in sizes)


def test_the_stages_of_a_detector_need_what_the_whole_computes(model, images):
    model = fuse_for_inference(model)
    profile = profile_stages(model, images, rounds=1, ceilings=of(1e3, moved=math.inf))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        for image in images:
            model([image / 255])
    assert set(profile.least) == set(STAGES) and profile.least["postprocess"] == profile.least["fixed"] == 0
    assert sum(profile.least.values()) == pytest.approx(counted.get_total_flops() / len(images))
    assert min(profile.least[stage] for stage in ("backbone", "neck", "head")) > 0
    moved = profile_stages(model, images, rounds=1, ceilings=of(math.inf, moved=1e3)).least
    assert min(moved.values()) > 0 and moved["backbone"] > moved["neck"]
