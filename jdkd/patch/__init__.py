"""What is put in place of something else: losses under other frameworks' names, and faster parts of a detector.

Importing this package registers :class:`FusedPKDLoss` with OpenMMLab where mmengine is installed.
"""

import importlib
from typing import Any

from jdkd.patch.losses import FusedPKDLoss, openmmlab

_ACCELERATION = {
    "Acceleration": "acceleration",
    "Difference": "agreement",
    "INGREDIENTS": "plans",
    "TOLERANCE": "agreement",
    "Trial": "acceleration",
    "accelerate": "acceleration",
    "restore": "acceleration",
}
"""Where a name stands that is imported when it is used, as it needs torchvision."""

__all__ = ["FusedPKDLoss", "openmmlab", *_ACCELERATION]


def __getattr__(name: str) -> Any:
    if name in _ACCELERATION:
        return getattr(importlib.import_module(f"{__name__}.{_ACCELERATION[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
