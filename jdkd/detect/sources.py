"""See :func:`open_model`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from jdkd.detect.checkpoint import SPEC, load
from jdkd.errors import InputError
from jdkd.rewrite import Architecture
from jdkd.rewrite.building import call
from jdkd.rewrite.checkpoint import ARCHITECTURE


def open_model(source: str) -> nn.Module:
    """A model by what a user calls it, in evaluation mode.

    Args:
        source: a folder written by ``jdkd train``, ``jdkd import`` or :func:`jdkd.detect.save`; the name of a detector
            of torchvision (``"retinanet_resnet50_fpn"``), which is built with fresh weights; or
            ``"package.module:function"``, which is imported (the current folder is looked in too) and called without
            arguments.

    Returns:
        The model; it carries the ``spec`` or the ``architecture`` that it was built from.

    Raises:
        InputError: it is none of these, or what it names makes no ``torch.nn.Module``.
    """
    if any((Path(source) / name).is_file() for name in (SPEC, ARCHITECTURE)):
        return load(source)
    builder, arguments = _builder(source)
    model = call(builder, arguments).eval()
    if not hasattr(model, "architecture"):
        model.architecture = Architecture(builder, arguments)
    return model


def _builder(source: str) -> tuple[str, dict[str, Any]]:
    """Import path and arguments of what makes a model."""
    if ":" in source:
        return source, {}
    from torchvision.models import detection as detectors
    from torchvision.models import get_model_builder, list_models

    known = list_models(module=detectors)
    if source not in known:
        raise InputError(
            f"{source!r} is no folder with a {SPEC} or {ARCHITECTURE}, no package.module:function and no detector of "
            f"torchvision ({', '.join(known)}); give one of these."
        )
    weights = [name for name in inspect.signature(get_model_builder(source)).parameters if name.startswith("weights")]
    return f"{detectors.__name__}:{source}", dict.fromkeys(weights)
