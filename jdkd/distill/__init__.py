"""One detector taught by another, through forward hooks; neither is changed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jdkd.distill.attachment import DistillationHandle, attach
from jdkd.distill.correlation import correlations, explained, pyramids
from jdkd.distill.distiller import Distiller
from jdkd.distill.feature import FeatureDistiller
from jdkd.distill.head import HeadDistiller, can_distil_heads
from jdkd.distill.normalisation import Normalisation

if TYPE_CHECKING:
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

_FROM_DATA_ON = ("DistillConfig", "Distilled", "comparable", "distill")


def __getattr__(name: str) -> Any:
    """What trains from data on needs more than torch, and is imported when it is asked for."""
    if name in _FROM_DATA_ON:
        return getattr(import_module("jdkd.distill.training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
