"""The kinds of normalisation that a detector may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from jdkd.errors import InputError
from jdkd.rewrite.building import call

NORMS = ("batch", "frozen", "sync", "group")
GROUP = 8  # channels a group: the 32 groups of 256 channels of FCOS's and RetinaNet's heads


def group_norm(channels: int) -> nn.GroupNorm:
    """Norm groups of 8 channels (Wu and He, ECCV 2018), or of fewer where 8 do not divide them."""
    return nn.GroupNorm(channels // math.gcd(channels, GROUP), channels)


def exchange_norms(model: nn.Module, norm: str, eps: float | None = None) -> nn.Module:
    """Puts norms of another kind in the place of every batch norm of 2 dimensions, with what these have learnt.

    Args:
        model: changed in place.
        norm: ``"batch"``, ``"frozen"`` (statistics and affine parameters fixed), ``"sync"`` (statistics over all
            processes of a training) or ``"group"``, which has no statistics and takes no weights over.
        eps: of the new norms; by default that of the old ones.

    Returns:
        The model.

    Raises:
        InputError: there is no such kind, the model has no batch norm, or one that does more than normalise.
    """
    if norm not in NORMS:
        raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if not found:
        raise InputError(
            f"norm {norm!r} takes the place of batch norms, and {type(model).__name__} has none; leave norm out."
        )
    if norm == "batch":
        return model
    for path, old in found:
        if type(old) is not nn.BatchNorm2d:
            raise InputError(
                f"norm {norm!r} cannot take the place of {path}, a {type(old).__name__}, which does more than "
                "normalise; leave norm out, or give a backbone with plain batch norms."
            )
        new = _norm(norm, old, old.eps if eps is None else eps)
        if norm != "group" and not old.weight.is_meta:
            new.load_state_dict(old.state_dict(), strict=False)
        model.set_submodule(path, new)
    return model


def _norm(norm: str, old: nn.BatchNorm2d, eps: float) -> nn.Module:
    if norm == "frozen":
        return FrozenBatchNorm2d(old.num_features, eps)
    if norm == "sync":
        return nn.SyncBatchNorm(old.num_features, eps, old.momentum)
    made = group_norm(old.num_features)
    made.eps = eps
    return made


def with_norms(builder: str, arguments: Mapping[str, Any], norm: str) -> nn.Module:
    """What a builder makes, with norms of another kind; see :func:`exchange_norms`.

    Args:
        builder: import path ``"package.module:function"``.
        arguments: what it is called with.
        norm: the kind.
    """
    with torch.no_grad():
        return exchange_norms(call(builder, arguments), norm)


def with_frozen_norms(builder: str, arguments: Mapping[str, Any], eps: float) -> nn.Module:
    """What a builder makes, with frozen batch norms: torchvision's detectors have them where weights were loaded.

    Args:
        builder: import path ``"package.module:function"``.
        arguments: what it is called with.
        eps: of the norms; torchvision sets 0 for its first COCO weights of a ResNet-50.
    """
    model = call(builder, arguments)
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return exchange_norms(model, "frozen", eps) if has_norms else model
