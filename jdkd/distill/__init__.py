"""One detector taught by another, through forward hooks; neither is changed."""

from jdkd.distill.adapter import explained
from jdkd.distill.attachment import DistillationHandle, attach
from jdkd.distill.correlation import correlations, pyramids
from jdkd.distill.distiller import Distiller
from jdkd.distill.feature import FeatureDistiller
from jdkd.distill.head import HeadDistiller, can_distil_heads
from jdkd.distill.normalisation import Normalisation
from jdkd.distill.training import DistillConfig, Distilled, comparable, distill

__all__ = [
    "DistillConfig",
    "DistillationHandle",
    "Distilled",
    "Distiller",
    "FeatureDistiller",
    "HeadDistiller",
    "Normalisation",
    "attach",
    "can_distil_heads",
    "comparable",
    "correlations",
    "distill",
    "explained",
    "pyramids",
]
