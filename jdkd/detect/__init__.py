"""Detectors: their builders, what is coupled in them, what is asked of them, and their checkpoints."""

from jdkd.detect.adopting import adopt
from jdkd.detect.checkpoint import load, save
from jdkd.detect.families import FAMILIES, detector
from jdkd.detect.importing import adapt_classes, frozen_like, import_detector
from jdkd.detect.narrowing import narrowed
from jdkd.detect.norms import with_frozen_norms, with_norms
from jdkd.detect.predictors import remake_predictors
from jdkd.detect.published import weights_file
from jdkd.detect.reading import read
from jdkd.detect.resizing import resized
from jdkd.detect.roi_scales import fix_roi_scales
from jdkd.detect.sources import open_model
from jdkd.detect.swapping import swap_features, swapped
from jdkd.detect.weights import LoadReport, load_weights, parameter_count

__all__ = [
    "FAMILIES",
    "LoadReport",
    "adapt_classes",
    "adopt",
    "detector",
    "fix_roi_scales",
    "frozen_like",
    "import_detector",
    "load",
    "load_weights",
    "narrowed",
    "open_model",
    "parameter_count",
    "read",
    "remake_predictors",
    "resized",
    "save",
    "swap_features",
    "swapped",
    "weights_file",
    "with_frozen_norms",
    "with_norms",
]
