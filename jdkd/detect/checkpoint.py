"""A checkpoint is a folder of data, never a pickled module.

It holds ``weights.safetensors`` and what they are the weights of, ``architecture.json``.
"""

from pathlib import Path

import torch
from torch import nn

from jdkd.detect.architecture import architecture_of
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import describe, load_architecture, save_architecture
from jdkd.rewrite.checkpoint import ARCHITECTURE, WEIGHTS

__all__ = ["ARCHITECTURE", "WEIGHTS", "load", "save"]


def save(folder: Path | str, model: nn.Module) -> None:
    """Writes the detector into ``folder`` (created if missing); each file appears whole or not at all.

    Args:
        folder: where to.
        model: any detector that carries its ``architecture``, as what :func:`jdkd.detect.detector`, :func:`load` and
            :func:`jdkd.detect.open_model` return does, rewritten since or not, in torch's wrappers or not.

    Raises:
        InputError: ``model`` carries none or differs from it in more than a rewrite changes, or ``folder`` cannot be
            written; nothing is written.
    """
    inner = unwrapped(model)
    known = architecture_of(inner, "save")
    save_architecture(folder, inner, describe(inner, known.builder, known.arguments, classes=known.classes))


def load(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuilds the detector that :func:`save` wrote, in evaluation mode; it carries its ``architecture``.

    Opening it calls the builder that the folder names, see :func:`jdkd.rewrite.load_architecture`.

    Raises:
        InputError: a file is missing or unreadable, the weights do not fit or are not finite, or the builder cannot be
            called.
    """
    return load_architecture(folder, device)
