"""The scales of torchvision's RoI pools in the detectors that are distilled."""

import sys

from torch import nn


def set_roi_scales_of(model: nn.Module) -> None:
    """Sets the scales of every RoI pool of a detector, see :func:`jdkd.detect.roi_scales.fix_roi_scales`."""
    ops = sys.modules.get("torchvision.ops")  # a model with a pool of torchvision's has imported it
    if ops is not None and any(isinstance(module, ops.MultiScaleRoIAlign) for module in model.modules()):
        from jdkd.detect.roi_scales import fix_roi_scales

        fix_roi_scales(model)
