"""See :func:`intermediates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD

from jdkd.detect.exportable import HEAD_OUTPUTS
from jdkd.nn.unwrapping import unwrapped

PROPOSING = ("objectness", "bbox_deltas")


def intermediates(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a detector computes on images, by the names of :attr:`Exportable.stage_names`, as far as it can be seen."""
    inner, seen = unwrapped(model), {}
    heads = {"head": inner.head} if hasattr(inner, "head") else {"head": inner.rpn.head, "rpn": inner.rpn}
    hooked = {"transform": inner.transform, "backbone": inner.backbone, **heads}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.setdefault(name, output))
        for name, module in hooked.items()
    ]
    try:
        with torch.no_grad():
            inner(list(images))
    finally:
        for handle in handles:
            handle.remove()
    levels = seen["backbone"]
    levels = dict(levels) if isinstance(levels, Mapping) else {"0": levels}
    found = {"the normalised image": seen["transform"][0].tensors}
    found |= {f"level {name}": level for name, level in levels.items()}
    if "rpn" in seen:
        for (name, _), *both in zip(levels.items(), *seen["head"], strict=True):
            found |= {f"{key} of level {name}": one for key, one in zip(PROPOSING, both, strict=True)}
        return found | {"proposals": seen["rpn"][0][0][None]}
    if isinstance(inner, SSD):  # its levels have different numbers of boxes a place
        return found | {key: output for key, output in seen["head"].items() if key in HEAD_OUTPUTS}
    cells = [level.shape[-2] * level.shape[-1] for level in levels.values()]
    for key, output in seen["head"].items():
        each = output.shape[1] // sum(cells)
        parts = output.split([count * each for count in cells], dim=1)
        if key in HEAD_OUTPUTS:
            found |= {f"{key} of level {name}": part for name, part in zip(levels, parts, strict=True)}
    return {name: found[name] for name in _in_order(found, levels)}


def _in_order(found: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> list[str]:
    """The names of stages of one stage's detectors, level by level."""
    of_heads = [name for level in levels for name in found if name.endswith(f" of level {level}")]
    return [name for name in found if name not in of_heads] + of_heads
