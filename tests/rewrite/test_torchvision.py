"""Every family of torchvision's detectors, narrow: verified, cut, run, trained, saved and loaded.

At full width, and over nine backbones: ``benchmarks/prunable.py``.
"""

import functools

import pytest
import torch
from torch import nn
from torchvision.models import mobilenetv2, regnet, resnet, swin_transformer
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from benchmarks import prunable
from jdkd.detect import read
from jdkd.rewrite import Architecture


def residual(norm: type[nn.Module], **options) -> nn.Module:
    net = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], norm_layer=norm, width_per_group=16, **options)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    body = nn.Sequential(stem, net.layer1, net.layer2, net.layer3)
    return prunable.Pyramid(body, {1: 256, 2: 512, 3: 1024}, 32)


def inverted() -> nn.Module:
    net = mobilenetv2.mobilenet_v2(width_mult=0.25)
    return prunable.Pyramid(net.features, {3: 8, 6: 8, 13: 24}, 32, prunable.group_norm)


def regular() -> nn.Module:
    """With squeeze-and-excitation."""
    settings = regnet.BlockParams([1, 2, 1], [16, 24, 32], [8] * 3, [1.0] * 3, [2] * 3, se_ratio=0.25)
    net = regnet.RegNet(settings, stem_width=16)
    return prunable.Pyramid(nn.Sequential(net.stem, *net.trunk_output), {1: 16, 2: 24, 3: 32}, 32)


def windows() -> nn.Module:
    net = swin_transformer.SwinTransformer([4, 4], 12, [1, 2, 1], [1, 2, 4], [2, 2])
    return prunable.Pyramid(net.features, {1: 12, 3: 24, 5: 48}, 32, channels_last=True)


def narrow_masks(backbone: nn.Module) -> nn.Module:
    model = prunable.two_stage(MaskRCNN, backbone, mask_head=MaskRCNNHeads(32, (16, 16), 1))
    model.roi_heads.mask_predictor = MaskRCNNPredictor(16, 16, prunable.CLASSES)
    return model


def narrow_keypoints(backbone: nn.Module) -> nn.Module:
    model = prunable.two_stage(KeypointRCNN, backbone, keypoint_head=KeypointRCNNHeads(32, (16, 16)))
    model.roi_heads.keypoint_predictor = KeypointRCNNPredictor(16, 17)
    return model


BACKBONES = {
    "frozen": lambda: residual(FrozenBatchNorm2d),
    "grouped": lambda: residual(prunable.group_norm, groups=4),
    "inverted": inverted,
    "regular": regular,
    "windows": windows,
}
FAMILIES = {
    "Faster R-CNN": functools.partial(prunable.two_stage, FasterRCNN),
    "Mask R-CNN": narrow_masks,
    "Keypoint R-CNN": narrow_keypoints,
    "RetinaNet": prunable.retinanet,
    "FCOS": prunable.fcos,
    "SSD": prunable.ssd,
    "SSDlite": functools.partial(prunable.ssd, lite=True),
}
PAIRS = [(family, [*BACKBONES][place % len(BACKBONES)]) for place, family in enumerate(FAMILIES)]


def narrow(family: str, backbone: str) -> nn.Module:
    """A builder."""
    return FAMILIES[family](BACKBONES[backbone]())


@pytest.mark.parametrize(("family", "backbone"), PAIRS)
def test_a_detector_of_torchvision_can_be_cut_everywhere(family, backbone, tmp_path):
    torch.manual_seed(0)
    model = narrow(family, backbone).eval()
    model.architecture = Architecture(f"{__name__}:narrow", {"family": family, "backbone": backbone})
    traced, topology = read(model), read(model, check=True)
    assert [group.name for group in topology.groups] == [group.name for group in traced.groups]
    assert all(group.grows for group in topology.groups) and not topology.unknown
    assert topology.prunable_share() > (0.8 if backbone == "windows" else 0.98)
    small, _ = prunable.check_cut(family, model, topology, tmp_path / "cut")
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


def test_cut_and_masked_agree_in_float32_too():
    model = narrow("FCOS", "regular").eval()
    topology = read(model)
    assert 1e-9 < prunable.worst_error(model, topology) < 1e-5


def test_the_committed_table_holds_what_is_promised():
    rows = prunable.load()
    for row in rows:
        assert row["disagreeing_groups"] == 0 and row["trace_seconds"] < 10 and not row["unknown_operators"], row
        assert row["worst_relative_error"] < 1e-4 and row["growing_groups"] == row["groups"], row
        assert row["trace_seconds"] + row["rewrite_seconds"] + row["build_seconds"] < 5, row
        if "resne" in row["backbone"]:
            assert row["prunable_share"] >= 0.95, row
    backbones = {family: {row["backbone"] for row in rows if row["detector"] == family} for family in FAMILIES}
    assert all(len(found) >= 3 for found in backbones.values()), backbones


def test_the_table_for_people_is_that_of_the_rows():
    assert prunable.TABLE.read_text() == prunable.table(prunable.load())
