"""Detectors as data: specs, builders, channel groups, weight inheritance and checkpoints."""

from jdkd.detect.adopting import adopt
from jdkd.detect.build import build, parameter_count
from jdkd.detect.checkpoint import load, save
from jdkd.detect.foreign import import_detector
from jdkd.detect.groups import Group, channel_groups
from jdkd.detect.inherit import NEW, inherit
from jdkd.detect.predictors import remake_predictors, with_frozen_norms
from jdkd.detect.reading import read
from jdkd.detect.roi_scales import fix_roi_scales
from jdkd.detect.sources import open_model
from jdkd.detect.spec import NAMED_SPECS, DetectorSpec, Stage, named_spec, round_width
from jdkd.detect.weights import LoadReport, load_weights

__all__ = [
    "NAMED_SPECS",
    "NEW",
    "DetectorSpec",
    "Group",
    "LoadReport",
    "Stage",
    "adopt",
    "build",
    "channel_groups",
    "fix_roi_scales",
    "import_detector",
    "inherit",
    "load",
    "load_weights",
    "named_spec",
    "open_model",
    "parameter_count",
    "read",
    "remake_predictors",
    "round_width",
    "save",
    "with_frozen_norms",
]
