"""Detectors as files that a runtime opens, checked against the detectors that they were made of.

What opens and draws (:mod:`jdkd.export.opening`, :mod:`jdkd.export.drawing`) imports torch where a file needs it alone,
so each name of this package is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdkd.export.opening import Exported, open_exported
    from jdkd.export.writing import exported

__all__ = ["Exported", "exported", "open_exported"]

_MODULES = {"Exported": "opening", "open_exported": "opening", "exported": "writing"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
