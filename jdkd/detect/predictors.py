"""What of a detector depends on its classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.models.detection.ssd import SSDClassificationHead
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead

from jdkd.detect.one_stage import PRIOR
from jdkd.detect.reppoints import RepPointsHead


def remake_predictors(model: nn.Module, num_classes: int) -> dict[str, tuple[int, int]] | None:
    """Makes exactly the layers of torchvision's detectors anew, in place, that have outputs for every class.

    Args:
        model: a detector of torchvision's parts.
        num_classes: classes with the background, as torchvision counts them in every family.

    Returns:
        The layers that were made anew, and how many outputs they had and have; empty if they have that number
        already, None if the model has no such part.
    """
    found, remade = False, {}
    for path, head in list(model.named_modules()):
        for name, each, old in list(_predictors(head)):
            found = True
            if old == num_classes:
                continue
            owner, _, leaf = name.rpartition(".")
            outputs = _outputs(each) // old * num_classes
            head.get_submodule(owner)._modules[leaf] = _fresh(each, outputs, focal=hasattr(head, "num_classes"))
            remade[f"{path}.{name}"] = (_outputs(each), outputs)
        for count in ("num_classes", "num_columns"):
            if isinstance(head, CLASSIFIERS) and hasattr(head, count):
                setattr(head, count, num_classes)
    return remade if found else None


def class_layers(model: nn.Module) -> dict[str, int]:
    """Layers of torchvision's detectors with outputs for every class, by path, and how many classes these have with the
    background; empty for other models."""
    return {
        f"{path}.{name}".lstrip("."): classes
        for path, head in model.named_modules()
        for name, _, classes in _predictors(head)
    }


def class_outputs(layer: str, outputs: int, classes: int, wanted: Sequence[int]) -> list[int]:
    """Outputs of a layer of :func:`class_layers` that are of some classes, in their order, as its rows lie.

    Args:
        layer: its path.
        outputs: how many it has.
        classes: of the layer, with the background, which is class 0.
        wanted: numbers of classes.
    """
    each = outputs // classes
    if layer.endswith(BOXES):  # the four of a class lie together
        return [number * each + place for number in wanted for place in range(each)]
    return [place * classes + number for place in range(each) for number in wanted]  # the classes of an anchor do


BOXES = "bbox_pred"  # of Faster R-CNN, whose boxes are of a class
CLASSIFIERS = (
    RetinaNetClassificationHead,
    FCOSClassificationHead,
    SSDClassificationHead,
    SSDLiteClassificationHead,
    RepPointsHead,
)


def _predictors(head: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Layers of a head with outputs for every class, by name within it, and how many classes it has."""
    if isinstance(head, FastRCNNPredictor):
        yield "cls_score", head.cls_score, head.cls_score.out_features
        yield BOXES, head.bbox_pred, head.cls_score.out_features
    elif isinstance(head, MaskRCNNPredictor):
        yield "mask_fcn_logits", head.mask_fcn_logits, head.mask_fcn_logits.out_channels
    elif isinstance(head, RetinaNetClassificationHead | FCOSClassificationHead | RepPointsHead):
        yield "cls_logits", head.cls_logits, head.num_classes
    elif isinstance(head, CLASSIFIERS):
        for level, predictor in enumerate(cast(nn.ModuleList, head.module_list)):
            last = f".{len(predictor) - 1}" if isinstance(predictor, nn.Sequential) else ""
            layer = predictor[-1] if isinstance(predictor, nn.Sequential) else predictor
            yield f"module_list.{level}{last}", layer, cast(int, head.num_columns)


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else cast(nn.Conv2d, layer).out_channels


def _fresh(layer: nn.Module, outputs: int, focal: bool) -> nn.Module:
    """A layer like this one with fresh weights and another number of outputs."""
    weight = cast(Tensor, layer.weight)
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, layer.bias is not None, **like)
    like |= {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    made = nn.Conv2d(cast(nn.Conv2d, layer).in_channels, outputs, bias=layer.bias is not None, **like)
    if focal and made.bias is not None:
        nn.init.normal_(made.weight, std=0.01)
        nn.init.constant_(made.bias, -math.log((1 - PRIOR) / PRIOR))
    return made
