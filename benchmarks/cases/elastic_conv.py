"""Elastic 3x3 convolution of one pyramid level at four widths, against what else could be done about a width.

The level is P3 of an 800x1344 image, 256 channels, two images, channels-last. ``mask_multiply`` runs the full
convolution on masked weights, ``slice_contiguous`` copies the active weights at every call, ``exported`` is the plain
``nn.Conv2d`` of the subnet: the bar. On a GPU ``jdkd triton`` is the kernel that reads the shared weight in place.
``least_bytes`` counts everything active once, gradients included where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Provider
from jdkd._backend import use_backend
from jdkd.nn import ElasticConv2d

NAME = "elastic_conv"
CHANNELS = 256
LEVELS = {"P3": (100, 168), "P4": (50, 84)}
WIDTHS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Inputs:
    """What the providers share: the slim image, the same image in full width, and the supernet's layer."""

    slim: Tensor  # [N, C, H, W]
    full: Tensor  # [N, CHANNELS, H, W], zero where inactive
    layer: ElasticConv2d
    exported: nn.Conv2d
    mask: Tensor  # [CHANNELS]
    rows: Tensor  # [C] indices of the active channels


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device; on a CPU the half width first, as it says most."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    levels = LEVELS if full or device == "cuda" else ("P3",)
    widths = WIDTHS if full or device == "cuda" else (0.5, 1.0)
    for dtype in dtypes:
        for level in levels:
            for width in widths:
                for mode in ("forward", "forward+backward"):
                    yield case(level, width, False, dtype, mode, device)
            yield case(level, 0.5, True, dtype, "forward", device)


def case(level: str, width: float, listed: bool, dtype: torch.dtype, mode: str, device: str, images: int = 2) -> Case:
    """One level at one width; ``listed`` takes every other channel instead of the leading ones."""
    active, (height, across) = int(CHANNELS * width), LEVELS[level]
    channels = [*range(0, CHANNELS, 2), *range(1, CHANNELS, 2)][:active] if listed else active
    backward = mode == "forward+backward"

    def make() -> Inputs:
        return inputs((images, CHANNELS, height, across), channels, device, dtype)

    runs = {"mask_multiply": mask_multiply, "slice_contiguous": slice_contiguous, "exported": exported, "jdkd": elastic}
    if device == "cuda":
        runs["jdkd triton"] = elastic_triton
    passes = 3 if backward else 1  # forward, and the gradients of image and weight
    numbers = 2 * images * height * across * active + 9 * active**2 + active
    return Case(
        NAME,
        f"{level} x{width:g}{' listed' if listed else ''} N={images}",
        mode,
        dtype,
        "channels-last",
        make,
        provided(exported, backward, wide=True),
        {name: provided(run, backward) for name, run in runs.items()},
        passes * numbers * dtype.itemsize,
    )


def inputs(size: tuple[int, ...], channels: int | list[int], device: str, dtype: torch.dtype) -> Inputs:
    """Draws the inputs of one case, everything channels-last."""
    layer = ElasticConv2d(CHANNELS, CHANNELS, 3, padding=1, device=device, dtype=dtype)
    layer.to(memory_format=torch.channels_last).set_active(channels, channels)
    rows = torch.tensor(channels if isinstance(channels, list) else range(channels), device=device)
    full = torch.zeros(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    full[:, rows] = torch.randn(size[0], len(rows), *size[2:], device=device, dtype=dtype)
    mask = torch.zeros(CHANNELS, device=device, dtype=dtype).index_fill_(0, rows, 1)
    slim = full[:, rows].contiguous(memory_format=torch.channels_last)
    plain = layer.export().to(memory_format=torch.channels_last)
    return Inputs(slim.requires_grad_(), full.requires_grad_(), layer, plain, mask, rows)


# Each of these returns the output, the image that went in and the weight that was shared.
Run = Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]


def mask_multiply(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    layer, mask = given.layer, given.mask
    weight = layer.weight * (mask[:, None, None, None] * mask[None, :, None, None])
    return F.conv2d(given.full, weight, layer.bias * mask, padding=1), given.full, layer.weight


def slice_contiguous(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    layer, rows, count = given.layer, given.rows, len(given.rows)
    if layer.in_channels_index is None:
        weight, bias = layer.weight[:count, :count].contiguous(), layer.bias[:count]
    else:
        weight, bias = layer.weight.index_select(0, rows).index_select(1, rows), layer.bias.index_select(0, rows)
    return F.conv2d(given.slim, weight, bias, padding=1), given.slim, layer.weight


def exported(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given.exported(given.slim), given.slim, given.exported.weight


def elastic(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given.layer(given.slim), given.slim, given.layer.weight


def elastic_triton(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    with use_backend("triton"):
        return elastic(given)


def provided(run: Run, backward: bool, wide: bool = False) -> Provider:
    """The active part of what a run gives, with the gradients of image and weight if ``backward``; ``wide`` computes
    in float32, whatever the dtype of the inputs."""

    def provider(given: Inputs) -> Sequence[Tensor]:
        if wide:
            plain = nn.Conv2d(*given.exported.weight.shape[1::-1], 3, padding=1, device=given.slim.device)
            plain.load_state_dict(given.exported.state_dict())
            slim = given.slim.detach().float().requires_grad_()
            given = Inputs(slim, given.full, given.layer, plain, given.mask, given.rows)
        with torch.set_grad_enabled(backward):
            output, image, weight = run(given)
        found = [active(output, given, 1)]
        if backward:
            of_image, of_weight = torch.autograd.grad(output, (image, weight), output.detach())
            found += [active(of_image, given, 1), active(active(of_weight, given, 0), given, 1)]
        return [tensor.detach() for tensor in found]

    return provider


def active(tensor: Tensor, given: Inputs, dim: int) -> Tensor:
    """The active channels of a tensor that may have all of them: leading ones as a view, so that nothing is timed that
    is not the provider's own work."""
    count = len(given.rows)
    if tensor.shape[dim] == count:
        return tensor
    if given.layer.in_channels_index is None:
        return tensor.narrow(dim, 0, count)
    return tensor.index_select(dim, given.rows)
