"""Small detectors that the tests of several rooms share."""

import dataclasses
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from jdkd.detect import fix_roi_scales
from jdkd.detect.backbones import Maps, Pyramid
from jdkd.rewrite import Architecture

CLASSES = ("cat", "dog", "bird")
BUILDER = "tests.detectors:faster_rcnn"
LEVELS = ("0", "1", "2", "3")


class Stage(NamedTuple):
    """Of a residual network: channels of its stream, and inner widths of each of its blocks: one, or of a bottleneck
    two."""

    width: int
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Spec:
    """What :func:`faster_rcnn` is called with."""

    classes: tuple[str, ...]
    stages: tuple[Stage, ...]
    stem: int = 8
    fpn: int = 16
    box_head: int = 24
    min_size: int = 64
    max_size: int = 96
    anchors: tuple[int, ...] = (8, 16, 32, 64, 128)
    proposals: int = 50
    rois: int = 32
    positives: float = 0.25
    roi_samples: int = 2
    max_detections: int = 100
    norm: str = "batch"

    def to_json(self) -> str:
        """Of its architecture, as a file of one has it."""
        return Architecture(BUILDER, dataclasses.asdict(self), classes=self.classes).to_json()


def small_spec(block: str = "basic", **changes) -> Spec:
    inner = {"basic": ((8,), (16,)), "bottleneck": ((8, 8), (16, 8))}[block]
    spec = Spec(CLASSES, tuple(Stage(width, inner) for width in (16, 16, 24, 32)))
    return dataclasses.replace(spec, **changes)


def tiny_spec(classes: tuple[str, ...], **changes) -> Spec:
    """An eighth of a ResNet-18 with one block a stage, and as many regions as small images have."""
    stages = tuple(Stage(width, ((width,),)) for width in (8, 16, 32, 64))
    regions = {"proposals": 300, "rois": 64, "positives": 0.5, "roi_samples": 1}
    spec = Spec(tuple(classes), stages, box_head=16, max_size=64, **regions)
    return dataclasses.replace(spec, **changes)


class Block(nn.Module):
    """A residual block under torchvision's names: 3x3, 3x3, or 1x1, 3x3, 1x1, with the stride in the first 3x3."""

    def __init__(self, channels: int, inner: tuple[int, ...], width: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        kernels, strides = ((3, 3), (stride, 1)) if len(inner) == 1 else ((1, 3, 1), (1, stride, 1))
        widths = (channels, *inner, width)
        self.conv3 = self.bn3 = None
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel, stride=step, padding=kernel // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", norm(widths[i + 1]))
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), norm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        if self.conv3 is not None:
            x = self.bn3(self.conv3(F.relu(x, inplace=True)))
        return F.relu(x + shortcut, inplace=True)


def body(spec: Spec) -> nn.Module:
    """A residual network of any widths and depths, under torchvision's names."""
    norm = FrozenBatchNorm2d if spec.norm == "frozen" else nn.BatchNorm2d
    layers = OrderedDict(conv1=nn.Conv2d(3, spec.stem, 7, stride=2, padding=3, bias=False), bn1=norm(spec.stem))
    layers |= {"relu": nn.ReLU(inplace=True), "maxpool": nn.MaxPool2d(3, stride=2, padding=1)}
    channels = spec.stem
    for number, (width, inner) in enumerate(spec.stages, start=1):
        blocks = []
        for i, widths in enumerate(inner):
            blocks.append(Block(channels, widths, width, 2 if i == 0 and number > 1 else 1, norm))
            channels = width
        layers[f"layer{number}"] = nn.Sequential(*blocks)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return IntermediateLayerGetter(network, {f"layer{int(level) + 1}": level for level in LEVELS})


def build(spec: Spec) -> FasterRCNN:
    """A Faster R-CNN with an FPN over a little residual network, with fresh weights; it carries its architecture."""
    anchors = AnchorGenerator(tuple((size,) for size in spec.anchors), ((0.5, 1.0, 2.0),) * len(spec.anchors))
    widths = tuple(width for width, _ in spec.stages)
    model = FasterRCNN(
        Pyramid(Maps(body(spec), LEVELS, widths), "P2-P6", spec.fpn),
        min_size=spec.min_size,
        max_size=spec.max_size,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=2 * spec.proposals,
        rpn_pre_nms_top_n_test=spec.proposals,
        rpn_post_nms_top_n_train=2 * spec.proposals,
        rpn_post_nms_top_n_test=spec.proposals,
        box_roi_pool=MultiScaleRoIAlign([*LEVELS], 7, sampling_ratio=spec.roi_samples),
        box_head=TwoMLPHead(spec.fpn * 7**2, spec.box_head),
        box_predictor=FastRCNNPredictor(spec.box_head, len(spec.classes) + 1),
        box_batch_size_per_image=spec.rois,
        box_positive_fraction=spec.positives,
        box_detections_per_img=spec.max_detections,
    )
    fix_roi_scales(model)
    model.architecture = Architecture(BUILDER, dataclasses.asdict(spec), classes=spec.classes)
    return model


def faster_rcnn(**fields) -> FasterRCNN:
    """What :func:`build` makes of the fields of a :class:`Spec`, as JSON has them."""
    return build(Spec(**fields))


def detector(spec: Spec, seed: int = 0) -> torch.nn.Module:
    """A detector whose normalisation statistics and affine parameters are anything but their defaults."""
    torch.manual_seed(seed)
    model = build(spec)
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "running_var")) else tensor.uniform_(-0.2, 0.2)
    return model.eval()


def mask_detector(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> torch.nn.Module:
    """A small detector with a mask head of torchvision's; also what `package.module:function` makes."""
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(seed)
    spec = small_spec(classes=tuple(classes))
    model = build(spec)
    del model.architecture
    heads = model.roi_heads
    heads.mask_roi_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=14, sampling_ratio=2)
    heads.mask_head = MaskRCNNHeads(spec.fpn, (16,), dilation=1)
    heads.mask_predictor = MaskRCNNPredictor(16, 16, len(spec.classes) + 1)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    """Everything that leaves the convolutional part and both heads, for one batch."""
    model.eval()
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    features = model.backbone(x)
    boxes = [torch.tensor([[2.0, 3.0, 40.0, 50.0], [10.0, 8.0, 30.0, 20.0]])] * 2
    regions = model.roi_heads.box_roi_pool(features, boxes, [(64, 96)] * 2)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(regions))
    objectness, proposals = model.rpn.head(list(features.values()))
    return [logits, deltas, *objectness, *proposals]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def hide_own_detectors(patch) -> None:
    """From now on every import of ``jdkd.detect``, or from it, fails, as where it is not installed."""
    for name in [name for name in sys.modules if name.startswith("jdkd.detect")]:
        patch.setitem(sys.modules, name, None)
