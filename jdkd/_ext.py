"""The compiled extension ``jdkd._C``: loaded once, when first asked for, with the reason where it is missing.

This is the only module that imports ``jdkd._C``. Loading it also registers ``torch.ops.jdkd_C.*``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch  # before jdkd._C, which needs its libraries in the process

_BUILD_HINT = "build it with `pip install --no-build-isolation .` in a checkout"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("jdkd._C"), None
    except ModuleNotFoundError as error:
        if error.name != "jdkd._C":
            raise
        return None, f"jdkd._C is not built: {_BUILD_HINT}"
    except ImportError as error:
        return None, f"jdkd._C does not load with torch {torch.__version__} ({error}): re{_BUILD_HINT}"


def module() -> ModuleType | None:
    """Returns: ``jdkd._C``, or None where it is missing."""
    return _load()[0]


def build_info() -> dict[str, Any] | None:
    """Returns: what ``jdkd._C`` was compiled with (see ``csrc/module.cpp``), or None where it is missing."""
    extension = module()
    return None if extension is None else extension.build_info()


@functools.cache
def why_missing(op: str | None = None, device: str = "cpu") -> str | None:
    """Says why an operator is not compiled.

    Args:
        op: noun stem of the operator, such as ``"pearson"``; None asks for the extension as a whole.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        None when it is there, else one clause with the reason and the remedy.
    """
    extension, reason = _load()
    if extension is None or op is None:
        return reason
    info = extension.build_info()
    if op in info[f"{device}_ops"]:
        return None
    if device == "cuda" and info["cuda"] is None:
        return "jdkd._C was built without a CUDA toolkit: see `python -m jdkd.env`"
    return f"jdkd._C has no {device} code for {op}"
