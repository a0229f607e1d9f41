"""Elastic convolutions of the detectors at four widths, against what else could be done about a width.

The shapes are those of :mod:`benchmarks.conv_shapes`, everything channels-last; a side that the detector shares with
nobody, the image's channels or the predictions, stays whole at every width.

==================  ================================================================================================
mask_multiply       the full convolution on masked weights: the baseline
full_width          the full convolution, without the kernels that mask: what the width saves
slice_contiguous    copies the active weights at every call (once-for-all)
boolean_indexing    takes them by boolean masks (mmrazor), whose number the host waits for: no CUDA graph holds it
torch.compile       of the slice; its row counts what it compiles when the widths take turns
exported            the plain ``nn.Conv2d`` of the subnet: the bar
jdkd                the elastic layer; ``jdkd triton`` is the kernel that reads the shared weight in place
==================  ================================================================================================

``mask_multiply`` and ``full_width`` get the image in full width, zero where inactive, so that every provider of a case
is held to the same active outputs. ``least_bytes`` counts everything active once, gradients included where there are
any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.conv_shapes import P6, P7, ConvShape, distinct
from benchmarks.graphs import Graphs
from benchmarks.harness import Case
from jdkd._backend import use_backend
from jdkd.nn import ElasticConv2d

NAME = "elastic_conv"
WIDTHS = (1.0, 0.75, 0.5, 0.25)
BATCHES = (1, 2, 8)
MODES = ("forward", "forward+backward")
P3, P4, P5 = (f"P{level} fpn 3x3 256->256" for level in (3, 4, 5))


@dataclass(frozen=True)
class Inputs:
    """What the providers share: the slim image, the same image in full width, and the supernet's layer."""

    slim: Tensor  # [N, Cin, H, W]
    full: Tensor  # [N, Cin_max, H, W], zero where inactive
    layer: ElasticConv2d
    exported: nn.Conv2d
    rows: Tensor  # [Cout] indices of the active output channels
    columns: Tensor  # [Cin] of the active input channels
    row_mask: Tensor  # [Cout_max] bool, which ones are active
    column_mask: Tensor  # [Cin_max] bool
    listed: bool


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device, those that carry a goal first; all of them if ``full``."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    if full:
        for dtype, images, label, width in itertools.product(dtypes, BATCHES, distinct(), WIDTHS):
            for listed, mode in itertools.product((False, True) if width < 1 else (False,), MODES):
                yield case(label, width, listed, dtype, mode, device, images, compiled=True)
        return
    chosen: list[tuple[str, float, bool, str, int]] = [(P3, width, False, "forward", 2) for width in (0.5, 1.0)]
    if device == "cuda":
        chosen += [(label, 0.5, False, "forward", 2) for label in (P4, P5, P6, P7)]
        chosen += [(label, 0.5, False, "forward", 1) for label in (P3, P4, P5, P6, P7)]
    chosen += [(P3, 0.5, False, "forward+backward", 2), (P3, 0.5, True, "forward", 2)]
    chosen += [("layer2 1x1 512->128", 0.5, False, "forward", 2), ("layer4 3x3 512->512", 0.5, False, "forward", 2)]
    if device == "cuda":
        chosen += [(P3, width, False, "forward", 2) for width in (0.75, 0.25)]
    for dtype in dtypes:
        every = distinct() if dtype == torch.bfloat16 else ()
        own = dict.fromkeys([*chosen, *((label, 0.5, False, "forward", 2) for label in every)])
        for number, (label, width, listed, mode, images) in enumerate(own):
            yield case(label, width, listed, dtype, mode, device, images, compiled=number == 0)


def case(
    label: str,
    width: float,
    listed: bool,
    dtype: torch.dtype,
    mode: str,
    device: str,
    images: int = 2,
    *,
    compiled: bool = False,
) -> Case:
    """One layer at one width.

    Args:
        label: of :func:`benchmarks.conv_shapes.distinct`.
        width: share of the channels that are active.
        listed: takes every other channel instead of the leading ones.
        dtype: of image and weight.
        mode: of :data:`MODES`.
        device: ``cpu`` or ``cuda``.
        images: the batch.
        compiled: whether torch.compile takes part, which is slow to begin.
    """
    shape, backward = distinct()[label], mode == "forward+backward"
    inputs, outputs = shape.active(width)
    runs: dict[str, Run] = {"mask_multiply": mask_multiply, "slice_contiguous": slice_contiguous}
    if width < 1 and not backward:
        runs["full_width"] = full_width
    runs |= {"boolean_indexing": boolean_indexing, "exported": exported}
    if compiled:
        runs["torch.compile"] = Compiled(shape, listed)
    runs["jdkd"] = elastic
    if device == "cuda":
        runs["jdkd triton"] = elastic_triton
    height, across = shape.size
    weights = outputs * (inputs * shape.kernel**2 + shape.bias)
    pixels = images * (inputs * height * across + outputs * shape.out_size[0] * shape.out_size[1])
    passes = 3 if backward else 1  # forward, and the gradients of image and weight
    return Case(
        NAME,
        f"{label} x{width:g}{' listed' if listed else ''} N={images}",
        mode,
        dtype,
        "channels-last",
        lambda: drawn(shape, width, listed, images, device, dtype),
        Provided(in_float32, backward),
        {name: Provided(run, backward) for name, run in runs.items()},
        passes * (pixels + weights) * dtype.itemsize,
        loose=("torch.compile",),
        waits=("boolean_indexing",),
    )


def drawn(shape: ConvShape, width: float, listed: bool, images: int, device: str, dtype: torch.dtype) -> Inputs:
    """Draws the inputs of one case, everything channels-last."""
    layer = ElasticConv2d(
        shape.in_channels, shape.out_channels, shape.kernel, shape.stride, shape.padding, bias=shape.bias,
        device=device, dtype=dtype,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    counts = shape.active(width)
    inputs, outputs = (
        channels(count, maximum, listed)
        for count, maximum in zip(counts, (shape.in_channels, shape.out_channels), strict=True)
    )
    layer.set_active(inputs, outputs)
    columns, rows = (torch.tensor(side, device=device) for side in (inputs, outputs))
    masks = [
        torch.zeros(maximum, dtype=torch.bool, device=device).index_fill_(0, index, True)
        for maximum, index in ((shape.out_channels, rows), (shape.in_channels, columns))
    ]
    slim = torch.randn(images, len(inputs), *shape.size, device=device, dtype=dtype)
    slim = slim.contiguous(memory_format=torch.channels_last)
    full = torch.zeros(images, shape.in_channels, *shape.size, device=device, dtype=dtype)
    full = full.contiguous(memory_format=torch.channels_last).index_copy_(1, columns, slim)
    plain = layer.export().to(memory_format=torch.channels_last)
    return Inputs(slim.requires_grad_(), full.requires_grad_(), layer, plain, rows, columns, *masks, listed)


def channels(count: int, maximum: int, listed: bool) -> list[int]:
    """The first ``count`` channels; if ``listed``, of every other one and then the rest, unless all are active."""
    if not listed or count == maximum:
        return [*range(count)]
    return [*range(0, maximum, 2), *range(1, maximum, 2)][:count]


# Each of these returns the output, the image that went in and the weight that was shared.
Run = Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]


def convolved(given: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    layer = given.layer
    return F.conv2d(x, weight, bias, layer.stride, layer.padding), x, layer.weight


def mask_multiply(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    layer = given.layer
    rows, columns = given.row_mask, given.column_mask
    weight = layer.weight * (rows[:, None, None, None] * columns[None, :, None, None])
    return convolved(given, given.full, weight, None if layer.bias is None else layer.bias * rows)


def full_width(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return convolved(given, given.full, given.layer.weight, given.layer.bias)


def slice_contiguous(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = sliced(given.layer.weight, given.layer.bias, given.rows, given.columns, given.listed)
    return convolved(given, given.slim, weight, bias)


def sliced(
    weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, listed: bool
) -> tuple[Tensor, Tensor | None]:
    """A dense copy of the active weights, ``[Cout, Cin, kh, kw]`` and ``[Cout]``."""
    if listed:
        weight, bias = (
            weight.index_select(0, rows).index_select(1, columns),
            None if bias is None else bias.index_select(0, rows),
        )
    else:
        weight, bias = weight[: len(rows), : len(columns)], None if bias is None else bias[: len(rows)]
    return weight.contiguous(memory_format=torch.channels_last), bias


def boolean_indexing(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    layer, rows, columns = given.layer, given.row_mask, given.column_mask
    bias = None if layer.bias is None else layer.bias[rows]
    return convolved(given, given.slim, layer.weight[rows][:, columns], bias)


def exported(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given.exported(given.slim), given.slim, given.exported.weight


def in_float32(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """What all are held to: the plain convolution of the subnet, in float32."""
    x, *parameters = (part.detach().float() for part in (given.slim, *given.exported.parameters()))
    x, weight = x.requires_grad_(), parameters[0].requires_grad_()
    layer = given.layer
    return F.conv2d(x, weight, *parameters[1:], stride=layer.stride, padding=layer.padding), x, weight


def elastic(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given.layer(given.slim), given.slim, given.layer.weight


def elastic_triton(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    with use_backend("triton"):
        return elastic(given)


class Compiled:
    """The slice and its convolution under torch.compile, as a run.

    The first call takes all widths in turn and counts the graphs that are compiled for them: ``note``.
    """

    def __init__(self, shape: ConvShape, listed: bool) -> None:
        self.shape, self.listed = shape, listed
        self.graphs, self.note = Graphs(), None
        self.run: Callable[..., Tensor] | None = None

    def __call__(self, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        if self.run is None:
            torch.compiler.reset()
            self.run = torch.compile(self.convolve, backend=self.graphs)
            x = given.slim
            for width in WIDTHS:
                self.of(drawn(self.shape, width, self.listed, len(x), x.device.type, x.dtype))
            self.note = f"{self.graphs.count} graphs compiled for {len(WIDTHS)} widths"
        return self.of(given), given.slim, given.layer.weight

    def of(self, given: Inputs) -> Tensor:
        layer = given.layer
        return self.run(given.slim, layer.weight, layer.bias, given.rows, given.columns, self.listed)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, listed: bool
    ) -> Tensor:
        weight, bias = sliced(weight, bias, rows, columns, listed)
        return F.conv2d(x, weight, bias, self.shape.stride, self.shape.padding)


@dataclass(frozen=True)
class Provided:
    """The active part of what a run gives, with the gradients of image and weight if ``backward``."""

    run: Run
    backward: bool

    @property
    def note(self) -> str | None:
        return getattr(self.run, "note", None)

    def __call__(self, given: Inputs) -> list[Tensor]:
        with torch.set_grad_enabled(self.backward):
            output, image, weight = self.run(given)
        found = [active(output, given.rows, 1, given.listed)]
        if self.backward:
            of_image, of_weight = torch.autograd.grad(output, (image, weight), output.detach())
            of_weight = active(of_weight, given.rows, 0, given.listed)
            found += [
                active(of_image, given.columns, 1, given.listed),
                active(of_weight, given.columns, 1, given.listed),
            ]
        return [tensor.detach() for tensor in found]


def active(tensor: Tensor, index: Tensor, dim: int, listed: bool) -> Tensor:
    """The active channels of a tensor that may have all of them: leading ones as a view, so that nothing is timed that
    is not the provider's own work."""
    if tensor.shape[dim] == len(index):
        return tensor
    return tensor.index_select(dim, index) if listed else tensor.narrow(dim, 0, len(index))
