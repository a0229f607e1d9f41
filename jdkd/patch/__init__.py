"""What is put in place of something else: faster parts of a detector, losses under other frameworks' names.

Importing this package registers :class:`FusedPKDLoss` with OpenMMLab where mmengine is installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jdkd.patch.losses import FusedPKDLoss, openmmlab

if TYPE_CHECKING:
    from jdkd.patch.acceleration import Acceleration, Trial, accelerate, restore
    from jdkd.patch.agreement import TOLERANCE, Difference
    from jdkd.patch.plans import INGREDIENTS

__all__ = [
    "INGREDIENTS",
    "TOLERANCE",
    "Acceleration",
    "Difference",
    "FusedPKDLoss",
    "Trial",
    "accelerate",
    "openmmlab",
    "restore",
]

_LATER = {  # where a name stands that is imported when it is used, as it takes torchvision
    "acceleration": ("Acceleration", "Trial", "accelerate", "restore"),
    "agreement": ("Difference", "TOLERANCE"),
    "plans": ("INGREDIENTS",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
