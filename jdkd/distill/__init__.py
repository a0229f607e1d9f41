"""One detector taught by another, through forward hooks; neither is changed."""

from jdkd.distill.adapter import explained
from jdkd.distill.attachment import DistillationHandle, attach
from jdkd.distill.correlation import correlations, pyramids
from jdkd.distill.distiller import Distiller
from jdkd.distill.feature import FeatureDistiller
from jdkd.distill.head import HeadDistiller, can_distil_heads
from jdkd.distill.normalisation import Normalisation
from jdkd.distill.training import DistillConfig, Distilled, distill

__all__ = [
    "DistillConfig",
    "Distilled",
    "DistillationHandle",
    "Distiller",
    "FeatureDistiller",
    "HeadDistiller",
    "Normalisation",
    "attach",
    "can_distil_heads",
    "correlations",
    "distill",
    "explained",
    "pyramids",
]
