import time

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from jdkd.errors import InputError
from jdkd.latency import StageProfile, fuse_for_inference, profile_stages
from jdkd.latency.roofline import Ceilings
from jdkd.latency.stages import Stopwatch
from tests.detectors import mask_detector
from tests.latency.conftest import Backbone

CEILINGS = Ceilings(1e9, ((1, 1e9),))


class Ticking:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def takes(self, module, seconds):
        forward = module.forward

        def slow(*given):
            self.takes_now(seconds)
            return forward(*given)

        module.forward = slow

    def takes_now(self, seconds):
        self.seconds += seconds


def test_time_counts_for_the_innermost_stage():
    clock = Ticking()
    stopwatch = Stopwatch(clock)
    inner = stopwatch.within("neck", lambda: clock.takes_now(3))

    def outer():
        clock.takes_now(2)
        inner()
        clock.takes_now(1)

    stopwatch.start()
    stopwatch.within("backbone", outer)()
    clock.takes_now(5)
    stopwatch.lap()
    assert stopwatch.seconds == {"backbone": 3, "neck": 3, "head": 0, "postprocess": 0, "fixed": 5}


def test_every_part_of_a_two_stage_detector_counts_for_its_stage(model, images):
    clock = Ticking()
    parts = {
        model.backbone.stem: 4, model.backbone.fpn.layer_blocks[0]: 2, model.rpn.head: 1, model.rpn.anchor_generator: 8,
        model.roi_heads.box_predictor: 16,
    }  # fmt: skip
    for part, seconds in parts.items():
        clock.takes(part, seconds)
    profile = profile_stages(model, images, rounds=2, now=clock, ceilings=CEILINGS)
    assert profile.stages == {"backbone": 4e3, "neck": 2e3, "head": 17e3, "postprocess": 8e3, "fixed": 0}
    assert profile.whole == 31e3 and profile.sums_up
    assert "forward" not in vars(model.backbone) and "postprocess" not in vars(model.transform)


def test_decoding_of_a_one_stage_detector_is_postprocessing(monkeypatch):
    clock, anchors = Ticking(), AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)
    model = RetinaNet(Backbone(8, nn.BatchNorm2d), 4, min_size=64, max_size=96, anchor_generator=anchors).eval()
    clock.takes(model.head, 4)
    decode = type(model).postprocess_detections

    def slow(self, *given):
        clock.takes_now(8)
        return decode(self, *given)

    monkeypatch.setattr(type(model), "postprocess_detections", slow)
    profile = profile_stages(model, [torch.zeros(3, 64, 64)], rounds=1, now=clock, ceilings=CEILINGS)
    assert profile.stages["head"] == 4e3 and profile.stages["postprocess"] == 8e3


def test_pasting_masks_is_postprocessing(monkeypatch):
    clock, model = Ticking(), mask_detector().eval()
    clock.takes(model.roi_heads.mask_head, 4)
    paste = type(model.transform).postprocess

    def slow(self, *given):
        clock.takes_now(8)
        return paste(self, *given)

    monkeypatch.setattr(type(model.transform), "postprocess", slow)
    profile = profile_stages(model, [torch.zeros(3, 64, 64)], rounds=1, now=clock, ceilings=CEILINGS)
    assert profile.stages["head"] == 4e3 and profile.stages["postprocess"] == 8e3


def test_the_stages_add_up_to_the_whole(model, images):
    waiting = Ticking()
    waiting.takes_now = time.sleep
    model = fuse_for_inference(model)
    for part in (model.backbone, model.rpn, model.roi_heads.box_head):
        waiting.takes(part, 0.01)  # so long that hooks and what else this machine does matter little
    profile = profile_stages(model, images, rounds=8, ceilings=CEILINGS)
    assert sum(profile.stages.values()) == pytest.approx(profile.whole, rel=0.1)
    assert min(profile.stages[stage] for stage in ("backbone", "head", "postprocess")) >= 10


def test_stages_that_do_not_add_up_are_not_believed():
    stages = {"backbone": 5.0, "fixed": 7.0}
    rest = {"backbone": 1.0, "fixed": 0.0}, CEILINGS
    assert StageProfile(stages, 11.5, *rest).sums_up and not StageProfile(stages, 10.0, *rest).sums_up
    stored = StageProfile(stages, 10.0, *rest).to_json()
    assert (
        stored["sum"] == 12
        and stored["least"] == rest[0]
        and stored["ceilings"] == {"flops": 1e9, "copies": ((1, 1e9),)}
    )


def test_a_detector_whose_backbone_is_not_known_is_refused(images):
    class Plain(nn.Module):
        def forward(self, images):
            return [
                {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()} for _ in images
            ]

    with pytest.raises(InputError, match="the stages of this Plain are not known"):
        profile_stages(Plain().eval(), images, rounds=1)
