"""From a spec to a detector: our backbone, torchvision's heads and operators."""

import dataclasses
import json
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from jdkd.detect.resnet import Backbone
from jdkd.detect.roi_scales import fix_roi_scales
from jdkd.detect.spec import DetectorSpec
from jdkd.errors import InputError
from jdkd.rewrite import Architecture

BUILDER = "jdkd.detect:faster_rcnn"
ROI_SIZE = 7
ASPECT_RATIOS = (0.5, 1.0, 2.0)


def build(spec: DetectorSpec) -> FasterRCNN:
    """Builds the detector that ``spec`` describes, with fresh weights.

    Args:
        spec: the architecture.

    Returns:
        A torchvision ``FasterRCNN`` (Ren et al., NeurIPS 2015, with FPN), which resizes and normalises its
        input itself; it carries its ``architecture``. In training it takes images (float ``[3, H, W]`` in
        0..1) and targets and returns losses, in evaluation it returns boxes, labels and scores.

    Raises:
        InputError: ``spec`` is no spec.
    """
    if not isinstance(spec, DetectorSpec):
        raise InputError(f"build takes a DetectorSpec, got {spec!r:.60}; make one with named_spec(name, classes).")
    anchors = AnchorGenerator(tuple((size,) for size in spec.anchors), (ASPECT_RATIOS,) * len(spec.anchors))
    model = FasterRCNN(
        Backbone(spec),
        min_size=spec.min_size,
        max_size=spec.max_size,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=2 * spec.proposals,
        rpn_pre_nms_top_n_test=spec.proposals,
        rpn_post_nms_top_n_train=2 * spec.proposals,
        rpn_post_nms_top_n_test=spec.proposals,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], ROI_SIZE, sampling_ratio=spec.roi_samples),
        box_head=TwoMLPHead(spec.fpn * ROI_SIZE**2, spec.box_head),
        box_predictor=FastRCNNPredictor(spec.box_head, len(spec.classes) + 1),
        box_batch_size_per_image=spec.rois,
        box_positive_fraction=spec.positives,
        box_detections_per_img=spec.max_detections,
    )
    fix_roi_scales(model)
    model.architecture = Architecture(BUILDER, dataclasses.asdict(spec), classes=spec.classes)
    return model


def faster_rcnn(**fields: Any) -> FasterRCNN:
    """Builds what :class:`DetectorSpec` describes by its fields, as JSON has them: what architectures name.

    Raises:
        InputError: the fields describe no detector.
    """
    return build(DetectorSpec.from_json(json.dumps(fields)))


def parameter_count(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
