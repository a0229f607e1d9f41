"""The compiled library ``jdkd/_C.so``: loaded once, when first asked for, with the reason where it is missing.

Its operators are ``torch.ops.jdkd_C.*``, of torch's stable ABI: it is no Python module, and serves every Python and
every torch from :data:`OLDEST_TORCH` on. This is the only module that loads it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from jdkd.errors import InputError

OLDEST_TORCH = (2, 11)
"""Of what jdkd runs with, in ``pyproject.toml`` too, and of the stable ABI that ``csrc/`` is written for."""

LIBRARY = Path(__file__).with_name("_C.so")

_BUILD_HINT = "build it with `pip install --no-build-isolation .` in a checkout"

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    _oldest = ".".join(map(str, OLDEST_TORCH))
    raise InputError(
        f"jdkd needs torch {_oldest} or later, and torch {torch.__version__} is installed: "
        f"pip install --upgrade 'torch>={_oldest}'"
    )


@functools.cache
def _why_not_loaded() -> str | None:
    if not LIBRARY.is_file():
        return f"jdkd._C is not built: {_BUILD_HINT}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # no libcudart of its major, say
        of = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return (
            f"jdkd._C does not load with torch {torch.__version__} {of} ({error.__cause__ or error}): re{_BUILD_HINT}"
        )
    return None


def library() -> Path | None:
    """Returns: the file of ``jdkd._C``, whose operators are registered then, or None where it is missing."""
    return None if _why_not_loaded() else LIBRARY


@functools.cache
def build_info() -> dict[str, Any] | None:
    """Returns: what ``jdkd._C`` was compiled with and of (see ``setup.py``), or None where it is missing."""
    if library() is None:
        return None
    known, compiler = torch.ops.jdkd_C.build_info()
    return {**json.loads(known), "compiler": compiler}


@functools.cache
def why_missing(op: str | None = None, device: str = "cpu") -> str | None:
    """Says why an operator is not compiled.

    Args:
        op: noun stem of the operator, such as ``"pearson"``; None asks for the extension as a whole.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        None when it is there, else one clause with the reason and the remedy.
    """
    info = build_info()
    if info is None or op is None:
        return _why_not_loaded()
    if op in info[f"{device}_ops"]:
        return None
    if device == "cuda" and info["cuda"] is None:
        return "jdkd._C was built without a CUDA toolkit: see `python -m jdkd.env`"
    return f"jdkd._C has no {device} code for {op}"
