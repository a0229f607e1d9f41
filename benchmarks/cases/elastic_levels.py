"""The 3x3 convolution and ReLU that a head shares over all levels, one launch for all against one for each.

The levels are those of the region proposals of R50-FPN, P2 to P6, or P5 to P7 as one-stage detectors have them, which
fill no GPU; channels-last. ``slice_contiguous`` copies the active weights once and runs level after level, ``exported``
is the plain ``nn.Conv2d`` of the subnet; ``jdkd triton`` is the launch for all levels. Gradients that go back are the
outputs, as rounded, so half precision is allowed twice its error. ``least_bytes`` counts everything active once,
gradients included where there are any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conv_shapes import P7, ConvShape, calls, distinct
from benchmarks.harness import TOLERANCES, Case
from jdkd._backend import use_backend
from jdkd.functional import elastic_conv2d_levels

NAME = "elastic_levels"
PYRAMIDS = {"P5-P7": slice(3, None), "P2-P6": slice(5)}
WIDTHS = (1.0, 0.75, 0.5, 0.25)
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Inputs:
    """What the providers share."""

    levels: list[Tensor]  # [N, Cin, H, W] each
    weight: Tensor  # [Cout_max, Cin_max, 3, 3], shared
    bias: Tensor  # [Cout_max]
    exported: tuple[Tensor, Tensor]  # [Cout, Cin, 3, 3] and [Cout], the active part


def head() -> list[ConvShape]:
    """The hidden layer of the region proposals, as each level meets it, and as P7 would."""
    found = [call.shape for call in calls("resnet50") if call.module.startswith("rpn.head.conv.")]
    return [*found, distinct()[P7]]


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device; on a CPU, whose levels run in turn, if ``full``."""
    if not (full or device == "cuda"):
        return
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    widths, batches = (WIDTHS, (1, 2, 8)) if full else ((0.5, 1.0), (2, 1))
    for dtype, width, mode, pyramid, images in itertools.product(dtypes, widths, MODES, PYRAMIDS, batches):
        yield case(pyramid, width, dtype, mode, device, images)


def case(pyramid: str, width: float, dtype: torch.dtype, mode: str, device: str, images: int = 2) -> Case:
    """One pyramid.

    Args:
        pyramid: of :data:`PYRAMIDS`.
        width: share of the channels that are active, the leading ones.
        dtype: of images and weight.
        mode: of :data:`MODES`.
        device: ``cpu`` or ``cuda``.
        images: the batch.
    """
    shapes, backward = head()[PYRAMIDS[pyramid]], mode == "forward+backward"
    inputs, outputs = shapes[0].active(width)
    runs: dict[str, Run] = {"slice_contiguous": slice_contiguous, "exported": exported, "jdkd": elastic}
    if device == "cuda":
        runs["jdkd triton"] = on_triton
    numbers = outputs * (inputs * shapes[0].kernel ** 2 + 1)
    numbers += sum(images * (inputs + outputs) * shape.size[0] * shape.size[1] for shape in shapes)
    return Case(
        NAME,
        f"{pyramid} rpn 3x3 {shapes[0].in_channels}->{shapes[0].out_channels} x{width:g} N={images}",
        mode,
        dtype,
        "channels-last",
        lambda: drawn(shapes, width, images, device, dtype),
        lambda given: provided(exported, backward)(in_float32(given)),
        {name: provided(run, backward) for name, run in runs.items()},
        (3 if backward else 1) * numbers * dtype.itemsize,
        tolerance=(2 if backward else 1) * TOLERANCES[dtype],
    )


def drawn(shapes: list[ConvShape], width: float, images: int, device: str, dtype: torch.dtype) -> Inputs:
    """Draws the inputs of one case, everything channels-last."""
    (inputs, outputs), whole = shapes[0].active(width), shapes[0]

    def normal(*size: int) -> Tensor:
        tensor = torch.randn(size, device=device, dtype=dtype)
        return tensor.contiguous(memory_format=torch.channels_last).requires_grad_()

    weight = normal(whole.out_channels, whole.in_channels, whole.kernel, whole.kernel)
    bias = torch.randn(whole.out_channels, device=device, dtype=dtype)
    part = weight.detach()[:outputs, :inputs].clone(memory_format=torch.channels_last).requires_grad_()
    return Inputs([normal(images, inputs, *shape.size) for shape in shapes], weight, bias, (part, bias[:outputs]))


def in_float32(given: Inputs) -> Inputs:
    """The same inputs in float32."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().float().requires_grad_()

    weight, bias = given.exported
    return Inputs([wide(x) for x in given.levels], given.weight, given.bias, (wide(weight), bias.float()))


# Each of these returns the outputs of all levels and the weight that was shared.
Run = Callable[[Inputs], tuple[list[Tensor], Tensor]]


def slice_contiguous(given: Inputs) -> tuple[list[Tensor], Tensor]:
    outputs, inputs = given.exported[0].shape[:2]
    weight = given.weight[:outputs, :inputs].contiguous(memory_format=torch.channels_last)
    return [F.conv2d(x, weight, given.bias[:outputs], padding=1).relu() for x in given.levels], given.weight


def exported(given: Inputs) -> tuple[list[Tensor], Tensor]:
    return [F.conv2d(x, *given.exported, padding=1).relu() for x in given.levels], given.exported[0]


def elastic(given: Inputs) -> tuple[list[Tensor], Tensor]:
    outputs, inputs = given.exported[0].shape[:2]
    levels = elastic_conv2d_levels(
        given.levels, given.weight, given.bias, in_channels=inputs, out_channels=outputs, padding=1, activation="relu"
    )
    return levels, given.weight


def on_triton(given: Inputs) -> tuple[list[Tensor], Tensor]:
    with use_backend("triton"):
        return elastic(given)


def provided(run: Run, backward: bool) -> Callable[[Inputs], list[Tensor]]:
    """The levels of a run, with the gradients of the images and of the active weight if ``backward``."""

    def provider(given: Inputs) -> list[Tensor]:
        outputs, inputs = given.exported[0].shape[:2]
        with torch.set_grad_enabled(backward):
            levels, weight = run(given)
        found = list(levels)
        if backward:
            gradients = [level.detach() for level in levels]
            *of_levels, of_weight = torch.autograd.grad(levels, [*given.levels, weight], gradients)
            found += [*of_levels, of_weight[:outputs, :inputs]]
        return [tensor.detach() for tensor in found]

    return provider
