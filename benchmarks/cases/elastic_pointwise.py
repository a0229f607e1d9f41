"""A 1x1 convolution of the active channels with what follows it, in one pass, against a pass for each.

The shapes are the last convolutions of the bottlenecks of R50-FPN at half width, channels-last. In ``evaluation`` batch
normalisation, residual and ReLU follow; ours takes the normalisation folded into a scale and a shift, as it is before
a frozen network runs. In ``training`` the result and its mean and variance are wanted, which the normalisation needs.

``eager`` is ATen's convolution (cuDNN's on a GPU) on a dense slice and torch's operators one after another;
``torch.compile`` is the same at a fixed shape; ``jdkd`` is the operator's default route, and on a GPU ``jdkd triton``
the kernel. ``least_bytes`` counts image, weight, residual and result once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conv_shapes import ConvShape, distinct
from benchmarks.harness import Case
from jdkd._backend import use_backend
from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d, elastic_pointwise_conv2d_stats

NAME = "elastic_pointwise"
LAYERS = ("layer1 1x1 64->256", "layer2 1x1 128->512", "layer3 1x1 256->1024", "layer4 1x1 512->2048")
MODES = ("evaluation", "training")
EPS = 1e-5


@dataclass(frozen=True)
class Inputs:
    """What the providers share."""

    x: Tensor  # [N, Cin, H, W]
    weight: Tensor  # [Cout_max, Cin_max, 1, 1], shared
    dense: Tensor  # [Cout, Cin, 1, 1], its active part
    residual: Tensor  # [N, Cout, OH, OW]
    statistics: tuple[Tensor, Tensor]  # running mean and variance, [Cout] float32 each
    affine: tuple[Tensor, Tensor]  # weight and bias of the normalisation, [Cout] float32 each
    folded: tuple[Tensor, Tensor]  # scale and shift of both, [Cout] float32 each


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device; on a CPU, where ours is ATen's convolution too, only if ``full``."""
    if device == "cuda" or full:
        dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
        widths = (0.5, 1.0, 0.25) if full else (0.5,)
        for dtype, width, mode, label in itertools.product(dtypes, widths, MODES, LAYERS):
            yield case(label, width, dtype, mode, device)


def case(label: str, width: float, dtype: torch.dtype, mode: str, device: str, images: int = 2) -> Case:
    """One layer.

    Args:
        label: a 1x1 convolution of :func:`benchmarks.conv_shapes.distinct`.
        width: share of the channels that are active.
        dtype: of image and weight.
        mode: of :data:`MODES`.
        device: ``cpu`` or ``cuda``.
        images: the batch.
    """
    shape, training = distinct()[label], mode == "training"
    inputs, outputs = shape.active(width)
    eager = statistics if training else normalised
    runs: dict[str, Run] = {"eager": eager, "torch.compile": compiled(eager)}
    runs["jdkd"] = jdkd_statistics if training else jdkd_normalised
    if device == "cuda":
        runs["jdkd triton"] = on_triton(runs["jdkd"])
    pixels, results = (images * height * across for height, across in (shape.size, shape.out_size))
    numbers = pixels * inputs + inputs * outputs + results * outputs * (1 if training else 2)
    return Case(
        NAME,
        f"{label} x{width:g} N={images}",
        mode,
        dtype,
        "channels-last",
        lambda: drawn(shape, width, images, device, dtype),
        lambda given: eager(in_float32(given), shape.stride),
        {name: provided(run, shape.stride) for name, run in runs.items()},
        numbers * dtype.itemsize,
        loose=("torch.compile",),
    )


def drawn(shape: ConvShape, width: float, images: int, device: str, dtype: torch.dtype) -> Inputs:
    """Draws the inputs of one case, everything channels-last."""
    inputs, outputs = shape.active(width)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def positive() -> Tensor:
        return torch.rand(outputs, device=device) + 0.5

    weight = normal(shape.out_channels, shape.in_channels, 1, 1) / inputs**0.5
    running, affine = (
        (torch.randn(outputs, device=device), positive()),
        (positive(), torch.randn(outputs, device=device)),
    )
    scale = affine[0] * torch.rsqrt(running[1] + EPS)
    return Inputs(
        normal(images, inputs, *shape.size),
        weight,
        weight[:outputs, :inputs].contiguous(memory_format=torch.channels_last),
        normal(images, outputs, *shape.out_size),
        running,
        affine,
        (scale, affine[1] - running[0] * scale),
    )


def in_float32(given: Inputs) -> Inputs:
    """The same inputs in float32."""
    return Inputs(*(part if isinstance(part, tuple) else part.float() for part in vars(given).values()))


# From inputs and the stride to the outputs.
Run = Callable[[Inputs, int], list[Tensor]]


def normalised(given: Inputs, stride: int) -> list[Tensor]:
    y = F.conv2d(given.x, given.dense, stride=stride)
    y = F.batch_norm(y, *given.statistics, *given.affine, eps=EPS)
    return [torch.relu(y + given.residual)]


def jdkd_normalised(given: Inputs, stride: int) -> list[Tensor]:
    scale, shift = given.folded
    outputs = len(scale)
    return [
        elastic_pointwise_conv2d(
            given.x, given.weight, out_channels=outputs, stride=stride, scale=scale, shift=shift,
            residual=given.residual, activation="relu",
        )
    ]  # fmt: skip


def statistics(given: Inputs, stride: int) -> list[Tensor]:
    y = F.conv2d(given.x, given.dense, stride=stride)
    variance, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    return [y, mean, variance]


def jdkd_statistics(given: Inputs, stride: int) -> list[Tensor]:
    return [*elastic_pointwise_conv2d_stats(given.x, given.weight, out_channels=len(given.dense), stride=stride)]


def compiled(run: Run) -> Run:
    """The run under torch.compile at a fixed shape; it is compiled at the first call, and what was before forgotten."""
    made: list[Run] = []

    def fused(given: Inputs, stride: int) -> list[Tensor]:
        if not made:
            torch.compiler.reset()
            made.append(torch.compile(run, dynamic=False))
        return made[0](given, stride)

    return fused


def on_triton(run: Run) -> Run:
    """The run on the kernel."""

    def kernel(given: Inputs, stride: int) -> list[Tensor]:
        with use_backend("triton"):
            return run(given, stride)

    return kernel


def provided(run: Run, stride: int) -> Callable[[Inputs], list[Tensor]]:
    def provider(given: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return run(given, stride)

    return provider
