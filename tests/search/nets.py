"""Small detectors of torchvision's parts over a backbone of ours; builders for architectures."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

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


def mask_rcnn(num_classes: int = 11) -> MaskRCNN:
    levels = ["0", "1", "2"]
    return MaskRCNN(
        Backbone(),
        rpn_anchor_generator=anchors(3),
        rpn_post_nms_top_n_test=30,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 1),
        box_head=TwoMLPHead(16 * 49, 24),
        box_predictor=FastRCNNPredictor(24, num_classes),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 1),
        mask_head=MaskRCNNHeads(16, (16, 16), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, num_classes),
        box_batch_size_per_image=16,
        **SIZES,
    )
