"""See :func:`weights_file`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torchvision.models import get_model_weights
from torchvision.models._api import WeightsEnum

from jdkd.detect.backbones import TIMM
from jdkd.detect.families import BUILDER
from jdkd.detect.sources import builders_of, parts_of
from jdkd.errors import InputError
from jdkd.rewrite import Architecture


def weights_file(weights: Path | str, architecture: Architecture) -> Path:
    """A file of weights: the one given, or that of torchvision's weights of that name for an architecture.

    Args:
        weights: a file, or ``"DEFAULT"``, ``"IMAGENET1K_V1"``, ``"COCO_V1"`` and so on, as torchvision calls them.
        architecture: of the detector that they are for.

    Returns:
        The file; torchvision's is in torch's cache, and fetched where it is not.

    Raises:
        InputError: torchvision has no such weights for it, or they are not in the cache and cannot be fetched.
    """
    if Path(weights).exists() or not re.fullmatch(r"[A-Z][A-Z0-9_]*", str(weights)):
        return Path(weights)
    known = _known(architecture)
    if str(weights) not in known:
        listed = ", ".join(known) or "none at all"
        raise InputError(f"torchvision has no weights {weights} for this detector, but {listed}; give one, or a file.")
    url = known[str(weights)].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        begins = re.search(r"-([a-f0-9]+)\.", file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), begins[1] if begins else None, progress=False)
        except (OSError, RuntimeError) as error:  # no network, no room, or another file than it should be
            raise InputError(
                f"torchvision's weights {weights} are not at {file} and cannot be fetched ({error}); put "
                f"{file.name} there, or give its path as the weights."
            ) from None
    return file


def _known(architecture: Architecture) -> dict[str, WeightsEnum]:
    """Names of the weights that torchvision has for a detector and else for its backbone."""
    *_, inner = builders_of(architecture)
    name = inner.builder.rpartition(":")[2]
    sources = [name, parts_of(name)[1]] if parts_of(name)[0] else []
    if inner.builder == BUILDER and not inner.arguments["backbone"].startswith(TIMM):
        sources = [inner.arguments["backbone"]]
    known: dict[str, WeightsEnum] = {}
    for each in sources:
        for weights, member in get_model_weights(each).__members__.items():
            known.setdefault(weights, member)
    return known
