"""See :func:`stages_of`."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork

from jdkd.detect.input_size import input_transform
from jdkd.errors import InputError
from jdkd.nn.necks import holders, trunk_of

STAGES = BACKBONE, NECK, HEAD, POSTPROCESS, FIXED = "backbone", "neck", "head", "postprocess", "fixed"
"""Backbone; neck; heads, RoI pooling with them; anchors, decoding, proposals and NMS; what no architecture changes:
resizing, normalising, copies, and glue."""
ANCHORS = AnchorGenerator, DefaultBoxGenerator
DECODING = "postprocess_detections"  # a method of torchvision's one-stage detectors


def stages_of(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """What a detector calls in each stage: a module, the name of its method, and the stage; of two, one within the
    other, the inner one counts.

    Args:
        model: a detector whose backbone is known.

    Raises:
        InputError: there is no telling which module it is.
    """
    trunk = trunk_of(model)
    if not trunk:
        raise InputError(
            f"the stages of this {type(model).__name__} are not known, as it does not say what returns its levels of "
            "features; set model.pyramid to that module's path."
        )
    necks = [part for module in trunk for part in module.modules() if isinstance(part, FeaturePyramidNetwork)]
    found = [(trunk[0], "forward", BACKBONE)]
    found += [(part, "forward", NECK) for part in [*trunk[1:], *necks]]
    if (transform := input_transform(model)) is not None:
        found += [(transform, "forward", FIXED), (transform, "postprocess", POSTPROCESS)]
    _, holder = holders(model)[0]
    if hasattr(holder, DECODING):
        found.append((holder, DECODING, POSTPROCESS))
    for child in holder.children():
        if isinstance(child, RegionProposalNetwork | RoIHeads):
            found.append((child, "forward", POSTPROCESS))
            found += [(part, "forward", HEAD) for part in child.children() if not isinstance(part, ANCHORS)]
        elif isinstance(child, ANCHORS):
            found.append((child, "forward", POSTPROCESS))
        elif child is not transform and all(child is not part for part in trunk):
            found.append((child, "forward", HEAD))
    unique = {(id(module), method): (module, method, stage) for module, method, stage in found}
    return list(unique.values())
