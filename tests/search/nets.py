"""Small detectors of torchvision's parts over a backbone of ours; builders for architectures."""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from jdkd.detect.atss import ATSS, ATSSHead
from jdkd.detect.gfl import GFL, GFLHead
from jdkd.detect.reppoints import RepPoints, RepPointsHead

SIZES = {"min_size": 64, "max_size": 64}
WIDTHS = (16, 24, 32)


class Backbone(nn.Module):
    """Two residual blocks a stage at strides 4, 8 and 16, and a pyramid over them."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 4, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.ModuleList(map(stage, (16, *WIDTHS), WIDTHS, (1, 2, 2)))
        self.pyramid = FeaturePyramidNetwork(list(WIDTHS), channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # [N, 3, H, W] -> {"0", "1", "2"}
        levels, x = OrderedDict(), self.stem(x)
        for number, blocks in enumerate(self.stages):
            levels[str(number)] = x = blocks(x)
        return self.pyramid(levels)


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if (inputs, stride) == (outputs, 1):
        return nn.Sequential(BasicBlock(inputs, outputs), BasicBlock(outputs, outputs))
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs))


def anchors(shapes: int) -> AnchorGenerator:
    return AnchorGenerator(tuple((size,) for size in (12, 24, 48)), ((0.5, 1.0, 2.0)[:shapes],) * 3)


def retinanet(num_classes: int = 11) -> RetinaNet:
    return RetinaNet(Backbone(), num_classes, anchor_generator=anchors(3), topk_candidates=60, **SIZES)


def fcos(num_classes: int = 11) -> FCOS:
    return FCOS(Backbone(32), num_classes, anchor_generator=anchors(1), topk_candidates=60, **SIZES)


def two_stages(family: str, num_classes: int = 11) -> FasterRCNN:
    """Faster, Mask or Keypoint R-CNN, or the second version of the former, with normalised heads."""
    second, width, levels = family.endswith("_v2"), 16, ["0", "1", "2"]
    norm = nn.BatchNorm2d if second else None
    kind, heads = FasterRCNN, {}
    if family.startswith("mask"):
        kind, heads = MaskRCNN, {"mask_head": MaskRCNNHeads(width, (16, 16), 1, norm)}
        heads |= {"mask_predictor": MaskRCNNPredictor(16, 16, num_classes)}
        heads |= {"mask_roi_pool": MultiScaleRoIAlign(levels, 14, 1)}
    elif family.startswith("keypoint"):
        kind, heads = KeypointRCNN, {"keypoint_head": KeypointRCNNHeads(width, (16, 16))}
        heads |= {"keypoint_predictor": KeypointRCNNPredictor(16, 17), "num_keypoints": None}
        heads |= {"keypoint_roi_pool": MultiScaleRoIAlign(levels, 14, 1)}
    convolutions = (width, 7, 7), [width] * 4, [24], norm
    return kind(
        Backbone(),
        rpn_anchor_generator=anchors(3),
        rpn_head=RPNHead(width, 3, conv_depth=1 + second),
        rpn_post_nms_top_n_test=30,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 1),
        box_head=FastRCNNConvFCHead(*convolutions) if second else TwoMLPHead(width * 49, 24),
        box_predictor=FastRCNNPredictor(24, num_classes),
        box_batch_size_per_image=16,
        **heads,
        **SIZES,
    )


def retinanet_v2(num_classes: int = 11) -> RetinaNet:
    head = RetinaNetHead(16, 3, num_classes, partial(nn.GroupNorm, 4))
    head.regression_head._loss_type = "giou"
    return RetinaNet(Backbone(), num_classes, anchor_generator=anchors(3), head=head, topk_candidates=60, **SIZES)


def of_every_place(family: str, num_classes: int = 11) -> FCOS:
    """ATSS, GFL or RepPoints."""
    kind, head = {"atss": (ATSS, ATSSHead), "gfl": (GFL, GFLHead), "reppoints": (RepPoints, RepPointsHead)}[family]
    how = {"anchor_generator": anchors(1), "head": head(16, num_classes), "topk_candidates": 60}
    return kind(Backbone(), num_classes, **how, **SIZES)


def ssd(num_classes: int = 11, lite: bool = False) -> SSD:
    boxes = DefaultBoxGenerator([[2]] * 3)
    given = [16] * 3, boxes.num_anchors_per_location(), num_classes
    head = SSDLiteHead(*given, nn.BatchNorm2d) if lite else SSDHead(*given)
    return SSD(Backbone(), boxes, (64, 64), num_classes, head=head, topk_candidates=60)
