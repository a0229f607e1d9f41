"""One detector taught by another, through forward hooks; neither is changed."""

from jdkd.distill.attachment import Attachment, attach
from jdkd.distill.correlation import correlations, pyramids
from jdkd.distill.distiller import Distiller
from jdkd.distill.feature import FeatureDistiller
from jdkd.distill.head import HeadDistiller

__all__ = ["Attachment", "Distiller", "FeatureDistiller", "HeadDistiller", "attach", "correlations", "pyramids"]
