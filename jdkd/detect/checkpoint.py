"""A checkpoint is a folder of data, never a pickled module.

It holds ``weights.safetensors`` and what they are the weights of: ``architecture.json``, or, in folders of earlier
versions, ``spec.json``.
"""

import os
from pathlib import Path

import torch
from torch import nn

from jdkd.detect.build import build
from jdkd.detect.contract import architecture_of
from jdkd.detect.spec import DetectorSpec
from jdkd.files import read_text
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import describe, load_architecture, save_architecture
from jdkd.rewrite.checkpoint import ARCHITECTURE, WEIGHTS, load_weights_into

__all__ = ["ARCHITECTURE", "SPEC", "WEIGHTS", "load", "save"]
SPEC = "spec.json"


def save(folder: Path | str, model: nn.Module) -> None:
    """Writes the detector into ``folder`` (created if missing); each file appears whole or not at all.

    Args:
        folder: where to.
        model: any detector that carries its ``architecture``, as what :func:`build`, :func:`load` and
            :func:`jdkd.detect.open_model` return does, rewritten since or not, in torch's wrappers or not.

    Raises:
        InputError: ``model`` carries none or differs from it in more than a rewrite changes, or ``folder`` cannot be
            written; nothing is written.
    """
    folder, inner = Path(folder), unwrapped(model)
    known = architecture_of(inner, "save")
    # False too for a folder that cannot be, which the next line refuses in words
    is_of_before = os.path.isfile(folder / WEIGHTS) and not os.path.isfile(folder / ARCHITECTURE)
    save_architecture(folder, inner, describe(inner, known.builder, known.arguments, classes=known.classes))
    if is_of_before:  # else a file of that name is somebody's
        (folder / SPEC).unlink(missing_ok=True)


def load(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuilds the detector that :func:`save` wrote, in evaluation mode; it carries its ``architecture``.

    Opening it calls the builder that the folder names, see :func:`jdkd.rewrite.load_architecture`. A folder of an
    earlier version, with a ``spec.json``, opens too.

    Raises:
        InputError: a file is missing or unreadable, the weights do not fit or are not finite, or the builder cannot be
            called.
    """
    folder = Path(folder)
    if (folder / ARCHITECTURE).is_file() or not (folder / SPEC).is_file():
        return load_architecture(folder, device)
    text = read_text(folder / SPEC, "give a folder written by `jdkd train`")
    model = build(DetectorSpec.from_json(text, source=str(folder / SPEC)))
    return load_weights_into(model, folder, model.architecture).to(device).eval()
