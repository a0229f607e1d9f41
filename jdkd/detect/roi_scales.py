"""See :func:`fix_roi_scales`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import say_once

PROBE = 256  # pixels: every stride up to 256 divides it
SAME = 0.5  # octaves: what an inferred scale errs at least is one


def set_roi_scales(pool: MultiScaleRoIAlign, strides: Sequence[float]) -> None:
    """Tells a pool the strides of its levels, finest first, so that it infers none from the first batch.

    Args:
        pool: assigns regions to levels by FPN's rule (Lin et al., CVPR 2017, equation 1).
        strides: pixels of the input per cell of each level that the pool reads.
    """
    pool.scales = [1 / stride for stride in strides]
    ends = (round(math.log2(strides[0])), round(math.log2(strides[-1])))
    pool.map_levels = initLevelMapper(*ends, canonical_scale=pool.canonical_scale, canonical_level=pool.canonical_level)


def fix_roi_scales(model: nn.Module) -> list[str]:
    """Sets the scales of every torchvision ``MultiScaleRoIAlign`` in a detector to those of its backbone's strides.

    The pool infers its scales from the height of the first batch before it was padded, and keeps them: an oblong
    image, which padding makes half as high again, sets them off by a factor of two for good. Here they are the
    strides of the levels that the backbone makes of a square image, rounded to a power of two as the pool does. The
    detectors of :func:`jdkd.detect.detector` have theirs from the start. The backbone runs once, in evaluation mode,
    unless every pool is known to be right; modes and weights stay as they are.

    Args:
        model: a detector, wrapped or not; pools are looked for next to every ``backbone`` in it.

    Returns:
        Names of the pools whose scales had been inferred wrongly; said once as well, as is where the scales could not
        be set.
    """
    wrong = []
    for owner, pools in _by_owner(model).items():
        if not (strides := _strides(owner)):
            where, kind = next(iter(pools.values())), type(owner).__name__
            say_once(
                f"{kind}: the scales of {where} cannot be checked, as no backbone beside it takes a square image; it "
                "infers them from the first batch, so let that be of images about as high as wide"
            )
            continue
        for pool, name in pools.items():
            ours = [stride for level, stride in strides.items() if level in pool.featmap_names]
            if not ours or _agree(pool, ours):
                continue
            before = pool.scales
            set_roi_scales(pool, [2.0 ** round(math.log2(stride)) for stride in ours])
            if before is not None:
                wrong.append(name)
                say_once(
                    f"{type(owner).__name__}: {name} had inferred the scales {_listed(before)} from its first batch; "
                    f"they are set to {_listed(pool.scales)}, those of the backbone's strides"
                )
    return wrong


def _by_owner(model: nn.Module) -> dict[nn.Module, dict[MultiScaleRoIAlign, str]]:
    """The pools and their names, by the innermost module that holds them beside a backbone, or by the model."""
    owner_of = {module: model for module in model.modules() if isinstance(module, MultiScaleRoIAlign)}
    for module in model.modules():  # parents come before their children
        if isinstance(getattr(module, "backbone", None), nn.Module):
            owner_of |= {pool: module for pool in module.modules() if isinstance(pool, MultiScaleRoIAlign)}
    names = {module: name for name, module in model.named_modules()}
    owners: dict[nn.Module, dict[MultiScaleRoIAlign, str]] = {}
    for pool, owner in owner_of.items():
        owners.setdefault(owner, {})[pool] = names[pool]
    return owners


def _strides(owner: nn.Module) -> dict[str, float]:
    """Stride of every level of the owner's backbone, by name; nothing where it does not run."""
    if not isinstance(backbone := getattr(owner, "backbone", None), nn.Module):
        return {}
    backbone = unwrapped(backbone)
    if isinstance(known := getattr(backbone, "strides", None), Mapping):  # ours say them
        return dict(known)
    return {name: stride for name, (stride, _) in probed_levels(owner).items()}


def probed_levels(owner: nn.Module) -> dict[str, tuple[float, int]]:
    """Stride and channels of every level that the owner's backbone makes of a square image, by name; nothing where it
    does not run.
    """
    backbone = unwrapped(cast(nn.Module, owner.backbone))
    transform = getattr(owner, "transform", None)
    channels = len(getattr(transform, "image_mean", (0, 0, 0)))
    like = next((t for t in (*backbone.parameters(), *backbone.buffers()) if t.is_floating_point()), torch.empty(0))
    with mode(backbone, training=False), torch.no_grad():
        for side in (PROBE, *_own_sides(transform)):
            try:
                levels = backbone(like.new_zeros(1, channels, side, side))
            except Exception:  # whatever a backbone raises on an image of another size than it is made for
                continue
            levels = {"0": levels} if isinstance(levels, Tensor) else levels
            if isinstance(levels, Mapping):
                return {name: (side / level.shape[-2], level.shape[1]) for name, level in levels.items()}
    return {}


def _own_sides(transform: nn.Module | None) -> Iterator[int]:
    """Sides of the square images that a detector's own transform makes, for a backbone of one size."""
    every = getattr(transform, "size_divisible", 1)
    for sizes in (getattr(transform, "fixed_size", None), getattr(transform, "min_size", None)):
        for size in (sizes,) if isinstance(sizes, int) else sizes or ():
            yield math.ceil(size / every) * every


def _agree(pool: MultiScaleRoIAlign, strides: Sequence[float]) -> bool:
    if pool.scales is None or pool.map_levels is None or len(pool.scales) != len(strides):
        return False
    return all(abs(math.log2(a * b)) < SAME for a, b in zip(pool.scales, strides, strict=True))


def _listed(scales: Sequence[float]) -> str:
    return ", ".join(f"1/{1 / scale:g}" for scale in scales)
