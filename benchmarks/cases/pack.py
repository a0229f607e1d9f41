"""The weights of a subnet of a ResNet at half width: packed, and their gradients brought back. No convolution runs.

``slice_contiguous`` is what supernets do: every layer slices its weight and copies the slice, and autograd brings the
gradient back. In ``forward+backward`` gradients are there already and are added to, as for every subnet of a step but
the first: in ``jdkd main_grad`` one launch adds them in place; in ``jdkd autograd`` the weights get dense ones, which
torch adds. In ``first forward+backward`` there are none yet. ``forward`` is the pack alone, and ``unpack`` the addition
in place alone, without autograd.

``least_bytes`` counts the active weights: read and written once by a pack; packed gradients read, and the shared ones
read and written, by the way back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.conv_shapes import backbone
from benchmarks.harness import Case, Provider
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack, packed_weights, unpack_add_
from jdkd.reference import pack as reference

NAME = "pack"
# A backbone, and how many of its convolutions; all of ResNet-101 but the last block are 37.9 M.
NETWORKS = {"ResNet-50": ("resnet50", 53), "37.9M of ResNet-101": ("resnet101", 101)}
LAYOUTS = {"channels-last": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass(frozen=True)
class Inputs:
    """What the providers share, and shared weights of their own for each, since they change their gradients."""

    weights: dict[str, list[Tensor]]  # [Cout_max, Cin_max, kh, kw] each, with gradients
    parts: list[Part]
    packed_gradients: list[Tensor]  # [Cout, Cin, kh, kw] each, channels-last


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32, torch.bfloat16)
    if device == "cuda":
        for layout, mode in itertools.product(LAYOUTS, ("forward", "unpack")):
            yield case(0.5, torch.bfloat16, layout, mode, device, network="37.9M of ResNet-101")
    for dtype in dtypes:
        for layout in LAYOUTS:
            for width in (0.5, 1.0, 0.25) if full else (0.5,):
                for mode in ("forward+backward", "first forward+backward", "forward"):
                    yield case(width, dtype, layout, mode, device)
            if full:
                yield case(0.5, dtype, layout, "forward+backward", device, listed=True)


def case(
    width: float,
    dtype: torch.dtype,
    layout: str,
    mode: str,
    device: str,
    listed: bool = False,
    network: str = "ResNet-50",
) -> Case:
    """All layers of a network of :data:`NETWORKS` at one width; ``listed`` takes every other channel instead of the
    leading ones."""
    name, count = NETWORKS[network]
    layers = backbone(name)[:count]
    shapes = [(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel) for layer in layers]
    parts = []
    for layer, (rows, columns, *_) in zip(layers, shapes, strict=True):
        inputs, outputs = layer.active(width)
        parts.append(Part(active(outputs, rows, listed, device), active(inputs, columns, listed, device)))
    backward, first = mode != "forward", mode.startswith("first")
    runs: dict[str, Run] = {"slice_contiguous": slice_contiguous, "jdkd": autograd}
    if mode == "forward+backward":
        runs = {"slice_contiguous": slice_contiguous, "jdkd autograd": autograd, "jdkd main_grad": main_grad}

    def make() -> Inputs:
        weights, gradients = {}, []
        for name in runs:
            drawn = [torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout]) for shape in shapes]
            weights[name] = drawn if not weights else [w.detach().clone() for w in next(iter(weights.values()))]
            for weight in weights[name]:
                weight.requires_grad_().grad = torch.zeros_like(weight)
        for (_, _, *kernel), part in zip(shapes, parts, strict=True):
            drawn = torch.randn(part.rows.count, part.columns.count, *kernel, device=device, dtype=dtype)
            gradients.append(drawn.contiguous(memory_format=torch.channels_last))
        return Inputs(weights, parts, gradients)

    numbers = sum(
        part.rows.count * part.columns.count * kh * kw for part, (_, _, kh, kw) in zip(parts, shapes, strict=True)
    )
    return Case(
        NAME,
        f"{network} x{width:g}{' listed' if listed else ''}",
        mode,
        dtype,
        layout,
        make,
        lambda given: exact(given, mode),
        {
            name: added(name) if mode == "unpack" else provided(name, run, dtype, backward, first)
            for name, run in runs.items()
        },
        numbers * ((mode != "unpack") * (4 + dtype.itemsize) + backward * ((4 if first else 8) + dtype.itemsize)),
        restore=restore if backward and not first else None,
    )


def active(count: int, maximum: int, listed: bool, device: str) -> Channels:
    if not listed or count == maximum:
        return Channels(count)
    order = [*range(0, maximum, 2), *range(1, maximum, 2)]
    return Channels(count, torch.tensor(order[:count], device=device))


def restore(given: Inputs) -> None:
    """Sets the gradients that are added to back to zero."""
    for weights in given.weights.values():
        torch._foreach_zero_([weight.grad for weight in weights])


def exact(given: Inputs, mode: str) -> list[Tensor]:
    """The packed weights, but not of an ``unpack``, and the gradients after one step, but not of a ``forward``."""
    weights = next(iter(given.weights.values()))
    rows, columns = (
        [channels.count if channels.index is None else channels.index for channels in side]
        for side in zip(*(part[:2] for part in given.parts), strict=True)
    )
    kernels = [None] * len(weights)
    with torch.no_grad():
        packed = reference.pack(weights, rows, columns, kernels, torch.float32) if mode != "unpack" else []
        gradients = [torch.zeros_like(weight) for weight in weights] if mode != "forward" else []
        if gradients:
            reference.unpack_add_(gradients, rows, columns, kernels, given.packed_gradients)
    return [*packed, *gradients]


# From shared weights and parts to packed weights.
Run = Callable[[Sequence[Tensor], Sequence[Part], torch.dtype], list[Tensor]]


def slice_contiguous(weights: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    packed = []
    for weight, (rows, columns, _) in zip(weights, parts, strict=True):
        if rows.index is None:
            part = weight[: rows.count, : columns.count]
        else:
            part = weight.index_select(0, rows.index)
            part = part if columns.index is None else part.index_select(1, columns.index)
        packed.append(part.to(dtype).contiguous(memory_format=torch.channels_last))
    return packed


def autograd(weights: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    return packed_weights(weights, parts, dtype) if torch.is_grad_enabled() else pack(weights, parts, dtype)


def main_grad(weights: Sequence[Tensor], parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    return packed_weights(weights, parts, dtype, "main_grad")


def added(name: str) -> Provider:
    """The gradients of a provider's own weights, to which the packed ones are added without autograd."""

    def provider(given: Inputs) -> list[Tensor]:
        gradients = [weight.grad for weight in given.weights[name]]
        if name == "jdkd":
            unpack_add_(gradients, given.parts, given.packed_gradients)
            return gradients
        for gradient, (rows, columns, _), own in zip(gradients, given.parts, given.packed_gradients, strict=True):
            gradient[: rows.count, : columns.count] += own
        return gradients

    return provider


class _Consumed(torch.autograd.Function):
    """What computes with the packed weights: a loss whose gradients with respect to them are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *packed: Tensor) -> Tensor:
        ctx.gradients = gradients
        return packed[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def provided(name: str, run: Run, dtype: torch.dtype, backward: bool, first: bool) -> Provider:
    """The packed weights of a run, and the gradients that it has added to if ``backward``."""

    def provider(given: Inputs) -> list[Tensor]:
        weights = given.weights[name]
        if first:
            for weight in weights:
                weight.grad = None
        with torch.set_grad_enabled(backward):
            packed = run(weights, given.parts, dtype)
        if backward:
            _Consumed.apply(given.packed_gradients, *packed).backward()
        return [*(view.detach() for view in packed), *(weight.grad for weight in weights if backward)]

    return provider
