"""Shapes of the packing of weights: one launch for all of them against slices, one by one, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdkd import _backend
from jdkd._verdicts import dtype_name
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack
from jdkd.tune.shapes import Shape, on_backend

OP = "pack"
NETWORKS = {"8 weights 32x32x3x3": (8, 32), "16 weights 256x256x3x3": (16, 256)}  # how many, and their channels


class Inputs(NamedTuple):
    """Shared weights ``[C, C, 3, 3]``, their gradients, and packed ones of half the channels."""

    weights: list[Tensor]
    gradients: list[Tensor]
    packed: list[Tensor]


def backends(device: torch.device, quick: bool) -> Iterator[Shape]:
    """A subnet of half the channels, packed, and its gradients brought back: dense, and added in place."""
    for label, (count, channels) in NETWORKS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for form, run in {"pack": _pack, "unpack": _unpack, "unpack_add_": _unpack_add}.items():
                yield Shape(
                    _backend.table_of(OP),
                    _backend.Call(form, device, torch.float32, torch.empty(0, device="meta")),
                    f"{label}, half of them, in {dtype_name(dtype)}",
                    partial(_drawn, count, channels, dtype, device),
                    {name: on_backend(name, run) for name in _backend.available(OP)},
                )


def _drawn(count: int, channels: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    weights = [torch.randn(channels, channels, 3, 3, device=device) for _ in range(count)]
    packed = pack(weights, _parts(weights), dtype)
    return Inputs(weights, [torch.zeros_like(weight) for weight in weights], [torch.ones_like(part) for part in packed])


def _parts(weights: list[Tensor]) -> list[Part]:
    return [Part(Channels(weight.shape[0] // 2), Channels(weight.shape[1] // 2)) for weight in weights]


def _flat(weights: list[Tensor]) -> tuple[list[None], list[None], list[int]]:
    sizes = [size for weight in weights for size in (weight.shape[0] // 2, weight.shape[1] // 2, 3, 3)]
    return [None] * len(weights), [None] * len(weights), sizes


def _pack(given: Inputs) -> Any:
    return torch.ops.jdkd.pack(given.weights, *_flat(given.weights), given.packed[0].dtype)


def _unpack(given: Inputs) -> Any:
    return torch.ops.jdkd.unpack(given.packed, given.weights, *_flat(given.weights))


def _unpack_add(given: Inputs) -> None:
    torch.ops.jdkd.unpack_add_(given.gradients, *_flat(given.weights), given.packed)
