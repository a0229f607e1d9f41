"""See :func:`open_model`."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from torch import nn

from jdkd.detect.checkpoint import SPEC, load
from jdkd.errors import InputError


def open_model(source: str) -> nn.Module:
    """A model by what a user calls it, in evaluation mode.

    Args:
        source: a folder written by ``jdkd train`` or :func:`jdkd.detect.save`; the name of a detector of torchvision
            (``"retinanet_resnet50_fpn"``), which is built with fresh weights; or ``"package.module:function"``, which
            is imported (the current folder is looked in too) and called without arguments.

    Raises:
        InputError: it is none of these, or what it names makes no ``torch.nn.Module``.
    """
    if (Path(source) / SPEC).is_file():
        return load(source)
    if ":" in source:
        return _called(source).eval()
    from torchvision.models import detection as detectors
    from torchvision.models import get_model_builder, list_models

    known = list_models(module=detectors)
    if source not in known:
        raise InputError(
            f"{source!r} is no folder with a {SPEC}, no package.module:function and no detector of torchvision "
            f"({', '.join(known)}); give one of these."
        )
    weights = {
        name: None for name in inspect.signature(get_model_builder(source)).parameters if name.startswith("weights")
    }
    return get_model_builder(source)(**weights).eval()


def _called(source: str) -> nn.Module:
    module, _, name = source.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise InputError(f"{source!r} names the module {error.name}, which cannot be found; check the name.") from None
    except (AttributeError, ValueError) as error:
        raise InputError(f"{source!r} cannot be imported ({error}); give package.module:function.") from None
    if not callable(function):
        raise InputError(f"{source!r} is a {type(function).__name__}; name a function that returns the model.")
    made = function()
    if not isinstance(made, nn.Module):
        raise InputError(f"{source!r} returned a {type(made).__name__}; it must return a torch.nn.Module.")
    return made
