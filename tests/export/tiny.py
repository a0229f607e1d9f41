"""Detectors of every family over a handful of convolutions, which find something without having been trained."""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

from jdkd.detect.atss import ATSS, ATSSHead
from jdkd.detect.exportable import exportable
from jdkd.detect.gfl import GFL, GFLHead
from jdkd.detect.reppoints import RepPoints, RepPointsHead
from jdkd.detect.roi_scales import set_roi_scales
from jdkd.export.opening import Exported
from jdkd.export.suppression import by_torchvision
from jdkd.export.writing import facts
from jdkd.rewrite import describe

WIDTH = 32
ONE_STAGE = {"fcos": FCOS, "retinanet": RetinaNet, "atss": ATSS, "gfl": GFL, "reppoints": RepPoints}
HEADS = {"atss": ATSSHead, "gfl": GFLHead, "reppoints": RepPointsHead}
SINGLE_SHOT = {"ssd": SSDHead, "ssdlite": partial(SSDLiteHead, norm_layer=nn.BatchNorm2d)}
FAMILIES = (*ONE_STAGE, *SINGLE_SHOT, "retinanet_v2", "fasterrcnn", "fasterrcnn_v2", "maskrcnn", "maskrcnn_v2")


class Levels(nn.Module):
    """Five levels, each of half the size of the one before, rounded up."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.out_channels = WIDTH
        self.stem = nn.Conv2d(3, WIDTH, first + 1, first, padding=first // 2)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.halves = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 2, padding=1) for _ in range(4))

    def forward(self, x):
        found = [self.norm(self.stem(x)).relu()]
        for half in self.halves:
            found.append(half(found[-1]).relu())
        return OrderedDict((str(number), level) for number, level in enumerate(found))


def tiny(family: str, outputs: int = 3) -> nn.Module:
    """A detector with weights that are far from each other; label 0 is never found."""
    if family in SINGLE_SHOT:
        steps = [8, 16, 32, 64, 128] if family == "ssd" else None
        boxes = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2], [2]], steps=steps)
        head = SINGLE_SHOT[family]([WIDTH] * 5, boxes.num_anchors_per_location(), outputs)
        most = {"topk_candidates": 40, "detections_per_img": 20, "score_thresh": 0.3}
        return SSD(Levels(8), boxes, (128, 96), outputs, head=head, **most)
    size = {"min_size": 96, "max_size": 128}
    family, second = family.removesuffix("_v2"), family.endswith("_v2")
    if family in ONE_STAGE:
        sides = (8, 16, 32, 64, 128)
        ratios = (0.5, 2.0) if family == "retinanet" else (1.0,)
        how = {"anchor_generator": AnchorGenerator(tuple((s,) for s in sides), (ratios,) * 5), **size}
        how |= {"topk_candidates": 40, "detections_per_img": 20, "score_thresh": 0.3}
        if family in HEADS:
            how["head"] = HEADS[family](WIDTH, outputs)
        elif second:
            how["head"] = RetinaNetHead(WIDTH, len(ratios), outputs, partial(nn.GroupNorm, 4))
        model = ONE_STAGE[family](Levels(8), outputs, **how)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = 4  # of 32, a group of a map of one cell would be one number
        return model

    def pool(side: int) -> MultiScaleRoIAlign:
        made = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2)
        set_roi_scales(made, (4, 8, 16, 32))
        return made

    norm = nn.BatchNorm2d if second else None
    convolutions = (WIDTH, 7, 7), [WIDTH] * 2, [16], norm
    how = {
        "rpn_anchor_generator": AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64, 128)), ((0.5, 1.0),) * 5),
        "rpn_pre_nms_top_n_test": 40,
        "rpn_post_nms_top_n_test": 30,
        "box_roi_pool": pool(7),
        "rpn_head": RPNHead(WIDTH, 2, conv_depth=1 + second),
        "box_head": FastRCNNConvFCHead(*convolutions) if second else TwoMLPHead(WIDTH * 49, 16),
        "box_predictor": FastRCNNPredictor(16, outputs),
        "box_detections_per_img": 12,
        **size,
    }
    if family == "fasterrcnn":
        return FasterRCNN(Levels(4), **how)
    masks = MaskRCNNHeads(WIDTH, (16,), 1, norm), MaskRCNNPredictor(16, 16, outputs)
    return MaskRCNN(Levels(4), mask_roi_pool=pool(14), mask_head=masks[0], mask_predictor=masks[1], **how)


@torch.no_grad()
def made(family: str, seed: int = 0) -> nn.Module:
    """The same with weights, and the architecture that it is saved with."""
    torch.manual_seed(seed)
    model = tiny(family).eval()
    head = getattr(model, "head", None) or model.roi_heads
    for module in [*head.modules(), *(model.rpn.modules() if hasattr(model, "rpn") else ())]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    for name, layer in model.named_modules():
        if name.endswith("cls_logits") and "rpn" not in name:
            layer.weight.mul_(0.5)
            layer.weight[::3], layer.bias[::3] = 0, -9
            layer.bias[1::3] = layer.bias[2::3] = -0.5
        if name.endswith(("bbox_reg", "bbox_pred", "refined_points", "initial_points")):
            layer.weight.mul_(0.2)
    model.architecture = describe(model, "tests.export.tiny:tiny", {"family": family}, classes=("red", "blue"))
    return model


def formed(model: nn.Module, nms: str = "inside", stages: bool = False) -> Exported:
    """What a file of the detector would be, without a file: its function of tensors."""
    form = exportable(model, by_torchvision, final=nms == "inside")
    form.with_stages = stages
    told = facts(model, form, "onnx", half=False, nms=nms, weights=None)

    def run(images, sizes):
        with torch.no_grad():
            found = form(torch.from_numpy(images), torch.from_numpy(sizes))
        return [output.numpy() for output in found]

    if stages:
        run(torch.zeros(1, 3, 96, 128).numpy(), torch.tensor([[96, 128]]).numpy())  # says their names
        told["outputs"] = [*form.names, *form.stage_names]
    return Exported(run, told)


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Coarse coloured patterns, ``[3, H, W]`` uint8."""
    generator = torch.Generator().manual_seed(1)
    coarse = [torch.rand(1, 3, 6, 7, generator=generator) * 255 for _ in sizes]
    return [
        nn.functional.interpolate(one, size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
        for one, size in zip(coarse, sizes, strict=True)
    ]
